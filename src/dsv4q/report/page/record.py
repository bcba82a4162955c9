"""Objects of report.json and its like, as plain dicts that can say what they lack."""

from __future__ import annotations

from typing import Any, TypeVar

Found = TypeVar("Found")


class Gap(Exception):
    """Something that a part of the page needs is not there; the page says so in place of the part."""


class Record(dict[str, Any]):
    """An object of a JSON file. To read a key that is not there is a `Gap` with its place; null is not there.

    Raises:
        RecursionError: too deep.
    """

    def __init__(self, values: dict[str, Any], name: str, inside: str = "") -> None:
        self.name, self._inside = name, inside
        """The file, and the keys that lead to this object in it."""
        super().__init__({key: self._placed(value, f"{inside}{key}") for key, value in values.items()})

    def _placed(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return Record(value, self.name, f"{place}.")
        if isinstance(value, list):
            return [self._placed(inner, f"{place}[{number}]") for number, inner in enumerate(value)]
        return value

    @property
    def place(self) -> str:
        """As the page names it."""
        return f"{self.name}: {self._inside.removesuffix('.')}"

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise Gap(f"{self.name}: {self._inside}{key} is missing")
        return value


def need(found: Found, otherwise: str) -> Found:
    """`found`.

    Raises:
        Gap: there is nothing in it; the text is `otherwise`.
    """
    if not found:
        raise Gap(otherwise)
    return found


def blocks_of(report: Record, key: str) -> list[tuple[str, Record]]:
    """Name and record of every main layer and stage of the draft that has the key, in order."""
    found = [(block["block"], block) for block in report["blocks"]]
    return [
        (name, block) for name, block in found if name.startswith(("layers.", "mtp.")) and block.get(key) is not None
    ]


def layers_of(report: Record, key: str) -> list[tuple[str, Record]]:
    """Number and record of every main layer that has the key, in order."""
    found = [(name, block) for name, block in blocks_of(report, key) if name.startswith("layers.")]
    return [(name.removeprefix("layers."), block) for name, block in found]
