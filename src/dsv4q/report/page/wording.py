"""Numbers, names and lists as the whole page writes them; None is a dash."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def five_digits(value: float) -> str:
    """For measures of quality."""
    return f"{value:,.5g}" if abs(value) < 1e5 else short(value)


def fixed(value: float | None, digits: int = 2) -> str:
    """For columns of a table: always as many decimals."""
    return "–" if value is None else f"{value:,.{digits}f}"


def counted(number: int, what: str = "") -> str:
    """`1,234`; `1 shard`, `2 shards`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}" if what else f"{number:,}"


def short_name(block: str) -> str:
    """A layer's number; other blocks by name."""
    return block.removeprefix("layers.")


def and_list(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(([", ".join(words[:-1])] if len(words) > 1 else []) + list(words[-1:]))


def heads_of(groups: Iterable[str], columns: Iterable[str], between: str = ": ") -> list[str]:
    """Heads of a table that has the same columns for each group: `w1: amax`."""
    return [f"{group}{between}{column}" for group in groups for column in columns]


@dataclass(frozen=True)
class Unit:
    """Of the bytes in a column of a table; decimal, 1 GB = 1e9 bytes."""

    name: str
    size: float

    def of(self, nbytes: float | None) -> str:
        """Always three decimals."""
        return fixed(None if nbytes is None else nbytes / self.size, 3)


_UNITS = (Unit("GB", 1e9), Unit("MB", 1e6), Unit("kB", 1e3))


def unit_for(largest: float) -> Unit:
    """One in which so many bytes have at least one digit before the point, if there is one."""
    return next((unit for unit in _UNITS if largest >= unit.size), _UNITS[-1])
