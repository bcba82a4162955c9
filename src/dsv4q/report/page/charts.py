"""Charts: axes, series and tooltips, in the values that they show; _charts.html draws them as inline SVG.

The drawing is stretched to the width there is, so it holds no text; ticks and legends are HTML around it and keep the
page's own size of letters on a phone and on paper. What a chart shows stands in its `aria-label`, its values in
tooltips (`<title>`) and in a table beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

SIDE = 1000
"""Coordinates of a drawing run from 0 to this in both directions."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """From values to places along one side of a chart."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    title: str = ""
    """With the unit."""

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        least = self.low if self.log else -math.inf
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, least)))
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def linear_axis(high: float, label: Callable[[float], str], title: str) -> Axis:
    """From 0 to a round number that is not below `high`."""
    high = high if high > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(step for step in (power * factor for factor in (1, 2, 5, 10, 20)) if step >= high / 5)
    count = math.ceil(high / step - 1e-9)
    return Axis(0.0, step * count, tuple((step * i, label(step * i)) for i in range(count + 1)), title=title)


def log_axis(low: float, high: float, label: Callable[[float], str], title: str) -> Axis:
    """Whole powers of ten around two positive values."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    powers = tuple((10.0**p, label(10.0**p)) for p in range(first, last + 1))
    return Axis(10.0**first, 10.0**last, powers, log=True, title=title)


def names_axis(names: Sequence[str], title: str) -> Axis:
    """One column for each name. Few are all named, of many the multiples of ten, and where the draft begins."""
    few, draft = len(names) <= 10, next((name for name in names if name.startswith("mtp.")), None)
    named = [
        (i, name) for i, name in enumerate(names) if few or name == draft or (name.isdecimal() and int(name) % 10 == 0)
    ]
    return Axis(0.0, float(max(len(names), 1)), tuple((i + 0.5, name) for i, name in named), title=title)


@dataclass(frozen=True)
class Line:
    """A series of points, drawn as line and dots; `band` are (x, low, high)."""

    name: str
    points: Points
    colour: int
    band: Sequence[tuple[float, float, float]] = ()

    @property
    def known(self) -> Points:
        """Those that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(y)]

    @property
    def highest(self) -> float:
        return max(y for _, y in self.points)

    @property
    def around(self) -> Points:
        """The outline of the band."""
        return [(x, low) for x, low, _ in self.band] + [(x, high) for x, _, high in reversed(self.band)]


@dataclass(frozen=True)
class Bars:
    """A part of stacked bars: column of the x axis, lower and upper end."""

    name: str
    colour: int
    spans: Sequence[tuple[int, float, float]]


@dataclass(frozen=True)
class Chart:
    """A drawing and what stands around it."""

    x: Axis
    y: Axis
    tips: Sequence[tuple[float, str]]
    """Tooltips from left to right, each with the x value that it reaches to; the first begins at 0."""
    bars: Sequence[Bars] = ()
    lines: Sequence[Line] = ()
    marks: tuple[str, Points] | None = None
    """Name, and column and value of something beside the bars, drawn as a line across its column."""

    @property
    def hits(self) -> list[tuple[float, float, str]]:
        """Left side and width of what carries each tooltip, as shares of the drawing."""
        ends = pairwise(self.x.place(end) for end in (0.0, *(end for end, _ in self.tips)))
        return [(left, right - left, text) for (left, right), (_, text) in zip(ends, self.tips, strict=True)]


def by_side(share: float) -> str:
    """A coordinate, from a share of the drawing."""
    return f"{share * SIDE:.1f}".removesuffix(".0")


def stacked(series: Sequence[tuple[str, int, Sequence[float]]]) -> list[Bars]:
    """Bars on top of each other.

    Args:
        series: name, colour and one value for each column, from below to the top.
    """
    below: dict[int, float] = defaultdict(float)
    found = []
    for name, colour, values in series:
        spans = [(column, below[column], below[column] + value) for column, value in enumerate(values) if value > 0]
        below |= {column: top for column, _, top in spans}
        found.append(Bars(name, colour, spans))
    return found
