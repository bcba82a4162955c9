"""JSON of unknown age, read with care: each value has the type asked for, or its absence has a name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LARGEST = 1 << 63


class Gap(Exception):
    """Something that a part of the page needs is not there; the page says so in place of the part."""


@dataclass(frozen=True)
class Node:
    """A JSON value and its place.

    Raises (from everything that reads a value):
        Gap: it is missing or of another type.
    """

    value: Any
    place: str
    """File and dotted keys, as the page names it."""

    def get(self, key: str) -> Node:
        """The value under `key` of an object."""
        found = self.maybe(key)
        if found is None:
            raise Gap(f"{self._under(key)} is missing")
        return found

    def maybe(self, key: str) -> Node | None:
        """The same; None if it is not there or null."""
        if not isinstance(self.value, dict):
            raise self._wrong("an object")
        inner = self.value.get(key)
        return None if inner is None else Node(inner, self._under(key))

    def items(self) -> list[tuple[str, Node]]:
        """Keys and values of an object."""
        if not isinstance(self.value, dict):
            raise self._wrong("an object")
        return [(str(key), Node(value, self._under(str(key)))) for key, value in self.value.items()]

    def __iter__(self) -> Iterator[Node]:
        """The values of a list."""
        if not isinstance(self.value, list):
            raise self._wrong("a list")
        return (Node(value, f"{self.place}[{number}]") for number, value in enumerate(self.value))

    def text(self, key: str) -> str:
        found = self.get(key)
        if not isinstance(found.value, str):
            raise found._wrong("a text")
        return found.value

    def integer(self, key: str) -> int:
        found = self.get(key)
        if type(found.value) is not int or abs(found.value) > _LARGEST:
            raise found._wrong("a whole number")
        return found.value

    def number(self, key: str) -> float:
        """May be infinite, never NaN."""
        return self.get(key).as_number()

    def seconds(self, key: str) -> float:
        """What a clock can say: finite and not negative."""
        found = self.get(key)
        value = found.as_number()
        if not 0 <= value < _LARGEST:
            raise found._wrong("a time in seconds")
        return value

    def as_number(self) -> float:
        value = self.value
        if isinstance(value, float) and not math.isnan(value):
            return value
        if type(value) is int and abs(value) <= _LARGEST:
            return float(value)
        raise self._wrong("a number")

    def integers(self, key: str) -> list[int]:
        found = self.get(key)
        values = [inner.value for inner in found]
        if not all(type(value) is int and 0 <= value <= _LARGEST for value in values):
            raise found._wrong("a list of counts")
        return values

    def texts(self, key: str) -> list[str]:
        found = self.get(key)
        values = [inner.value for inner in found]
        if not all(isinstance(value, str) for value in values):
            raise found._wrong("a list of texts")
        return values

    def _under(self, key: str) -> str:
        return f"{self.place}: {key}" if self.place.endswith(".json") else f"{self.place}.{key}"

    def _wrong(self, expected: str) -> Gap:
        return Gap(f"{self.place} is not {expected}")
