"""Numbers, names and lists as the whole page writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percent(share: float) -> str:
    """`8.12 %`; small ones with two digits that say something, exact zero as `0 %`."""
    if share == 0:
        return "0 %"
    if not math.isfinite(share):
        return "infinite"
    digits = 2 if abs(share) >= 0.0001 else min(12, 1 - math.floor(math.log10(abs(share) * 100)))
    return f"{share * 100:.{digits}f} %"


def axis_percent(share: float) -> str:
    """For ticks: round numbers."""
    return f"{share * 100:.3g} %"


def short(value: float) -> str:
    """Four digits that say something, without an exponent where that is readable."""
    if not math.isfinite(value):
        return "infinite"
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) < 1e12 and abs(value) >= 1 else f"{value:.3e}"


def seconds(value: float | None) -> str:
    """For columns of a table: always two decimals."""
    return "–" if value is None else f"{value:,.2f}"


def counted(differences: int) -> str:
    """`1 difference`, `2 differences`."""
    return f"{differences:,} difference{'' if differences == 1 else 's'}"


def short_name(block: str) -> str:
    """A layer's number; other blocks by name."""
    return block.removeprefix("layers.")


def and_list(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(([", ".join(words[:-1])] if len(words) > 1 else []) + list(words[-1:]))


@dataclass(frozen=True)
class Unit:
    """Of the bytes in a column of a table; decimal, 1 GB = 1e9 bytes."""

    name: str
    size: float

    def of(self, nbytes: float | None) -> str:
        """Always three decimals."""
        return "–" if nbytes is None else f"{nbytes / self.size:,.3f}"

    @classmethod
    def for_bytes(cls, largest: float) -> Unit:
        """One in which `largest` has at least one digit before the point, if there is one."""
        return next((unit for unit in _UNITS if largest >= unit.size), _UNITS[-1])


_UNITS = (Unit("GB", 1e9), Unit("MB", 1e6), Unit("kB", 1e3))
