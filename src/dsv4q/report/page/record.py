"""Objects of report.json and its like, as plain dicts that can say what they lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

_MALFORMED = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What comes of reading a value as something that it is not."""


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


def shown_or_gap(view: Callable[..., Result], record: Record | Gap, *more: object) -> Result:
    """What a view makes of a record.

    Raises:
        Gap: there is no record, it lacks something, or something in it is of another type.
    """
    if isinstance(record, Gap):
        raise record
    try:
        return view(record, *more)
    except _MALFORMED as error:
        # files can be edited by hand: what a view trips over is in the file, as the tests of whole ones show
        what = view.__name__.strip("_").replace("_", " ")
        raise Gap(f"{record.name} has no {what} that this version can read") from error


def layers_of(report: Record) -> list[tuple[str, Record]]:
    """Number and record of every main layer, in order."""
    found = [(block["block"], block) for block in report["blocks"]]
    return [(name.removeprefix("layers."), block) for name, block in found if name.startswith("layers.")]
