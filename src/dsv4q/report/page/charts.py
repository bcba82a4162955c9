"""Charts as inline SVG; the template frames them in HTML.

The drawing is stretched to the width there is, so it holds no text; ticks and legends are HTML around it and keep the
page's own size of letters on a phone and on paper. Coordinates inside run from 0 to 1000 in both directions. What a
chart shows stands in its `aria-label`, its values in tooltips (`<title>`) and in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

SIDE = 1000
_SHAPES = ("none", "7 4", "2 4", "10 3 2 3")
"""Dashes of the lines, so that colour alone tells nothing."""

Tips = Sequence[tuple[float, str]]
"""Tooltips from left to right, each with the x value that it reaches to; the first begins at 0."""


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
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, self._least)))
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf

    def labels(self) -> list[tuple[str, str]]:
        """Place of each tick in per cent, and its text."""
        return [(f"{100 * self.place(value):.2f}", text) for value, text in self.ticks]


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
    """One column for each name. Few are all named, of many those that are multiples of ten."""
    few = len(names) <= 10
    named = [(i, name) for i, name in enumerate(names) if few or (name.isdecimal() and int(name) % 10 == 0)]
    return Axis(0.0, float(max(len(names), 1)), tuple((i + 0.5, name) for i, name in named), title=title)


@dataclass(frozen=True)
class Line:
    """A series of points, drawn as line and dots; `band` are (x, low, high)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Figure:
    """A drawing and what stands around it."""

    x: Axis
    y: Axis
    svg: Markup
    """Elements in coordinates of 0 to 1000, y downwards."""
    legend: Sequence[tuple[str, Markup]] = ()
    """Name and small drawing of each series."""
    height: str = "14rem"
    classes: str = ""
    bar: tuple[str, str] | None = None
    """A bar beside the topmost rows of a heat map: its length, and the place of its label from below, in per cent."""

    @property
    def y_width(self) -> float:
        """Of the longest label, in rem."""
        return 0.48 * max((len(text) for _, text in self.y.ticks), default=0) + 0.3


def line_chart(x: Axis, y: Axis, lines: Sequence[Line], tips: Tips) -> Figure:
    """Lines over a grid."""
    drawn, legend = [_grid(y)], []
    for number, line in enumerate(lines):
        known = [(a, b) for a, b in line.points if math.isfinite(b)]
        colour = f"c{line.colour}"
        if line.band:
            around = [(a, low) for a, low, _ in line.band] + [(a, high) for a, _, high in reversed(line.band)]
            drawn.append(_path(f"band {colour}", _through(around, x, y) + "z"))
        dots = _dots(_at_each(known, x, y), number) if len(known) <= 150 else ""
        drawn.append(group(colour, _stroke(_through(known, x, y), number), dots))
        legend.append((line.name, _legend(colour, _stroke("M0 6h24", number) + _dots("M12 6h0", number))))
    return Figure(x, y, Markup().join([*drawn, _hits(tips, x)]), legend)


def bar_chart(
    x: Axis,
    y: Axis,
    stacks: Sequence[tuple[str, int, Sequence[float]]],
    marks: tuple[str, Sequence[float | None]] | None,
    tips: Tips,
) -> Figure:
    """Stacked bars, one for each column of the x axis.

    Args:
        stacks: name, colour and one value for each column, from below to the top.
        marks: name and values of something beside the stack, drawn as a line across its column.
    """
    columns = round(x.high)
    below = [0.0] * columns
    drawn, legend = [_grid(y)], []
    for name, colour, values in stacks:
        rects = []
        for column, value in enumerate(values):
            if value <= 0:
                continue
            top, bottom = y.place(below[column] + value), y.place(below[column])
            below[column] += value
            rects.append(_rect(x.place(column + 0.1), top, 0.8 / columns, top - bottom))
        drawn.append(group(f"fill c{colour}", *rects))
        legend.append((name, legend_box(f"c{colour}")))
    if marks is not None:
        places = [(column, value) for column, value in enumerate(marks[1]) if value is not None]
        width = f"h{_c(0.96 / columns)}"
        drawn.append(_path("mark", "".join(_move(x.place(i + 0.02), y.place(v)) + width for i, v in places)))
        legend.append((marks[0], _legend("", _path("mark", "M0 6h24"))))
    return Figure(x, y, Markup().join([*drawn, _hits(tips, x)]), legend)


def pair_of_bars(above: float, below: float) -> Markup:
    """Two small bars for a cell of a table; shares of the longest one."""
    rect = Markup('<rect class="c{} fill" y="{}" width="{:.2f}" height="5"/>')
    bars = rect.format(6, 0, 100 * above) + rect.format(0, 6, 100 * below)
    svg = '<svg class="bar" viewBox="0 0 100 11" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    return Markup(svg).format(bars)


def block_strip(columns: int, held: Sequence[tuple[int, str]], described: str) -> Markup:
    """A cell for each block, for a cell of a table; column and tooltip of those that are filled."""
    svg = Markup('<svg class="map" viewBox="0 0 {} 1" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>')
    rect = Markup('<rect x="{}" width="0.92" height="1" class="fill"><title>{}</title></rect>')
    lines = _path("grid", "".join(f"M{column} 1h.92" for column in range(columns)))
    return svg.format(columns, described, lines + group("c0", *(rect.format(*one) for one in held)))


def group(classes: str, *inner: str) -> Markup:
    return Markup('<g class="{}">{}</g>').format(classes, Markup().join(inner))


def legend_box(classes: str) -> Markup:
    """Drawing of a legend: a filled box."""
    return _legend(classes, Markup('<rect class="fill" width="16" height="12" x="4"/>'))


def _legend(classes: str, drawing: Markup) -> Markup:
    return Markup('<svg viewBox="0 0 24 12" class="{}" aria-hidden="true">{}</svg>').format(classes, drawing)


def _hits(tips: Tips, x: Axis) -> Markup:
    """Invisible columns over a drawing that carry tooltips."""
    ends = pairwise(x.place(end) for end in (0.0, *(end for end, _ in tips)))
    return group("hit", *(_rect(a, 1.0, b - a, 1.0, text) for (a, b), (_, text) in zip(ends, tips, strict=True)))


def _rect(left: float, top: float, width: float, height: float, title: str | None = None) -> Markup:
    """Fractions of the drawing; `top` counted from below."""
    inner = "" if title is None else Markup("<title>{}</title>").format(title)
    rect = Markup('<rect x="{}" y="{}" width="{}" height="{}">{}</rect>')
    return rect.format(_c(left), _c(1 - top), _c(width), _c(height), inner)


def _path(classes: str, d: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(classes, d)


def _stroke(d: str, number: int) -> Markup:
    dash = _SHAPES[number % len(_SHAPES)]
    return Markup('<path class="stroke" d="{}" stroke-dasharray="{}"/>').format(d, dash)


def _dots(d: str, number: int) -> Markup:
    return _path("dot square" if number % 2 else "dot", d)


def _grid(y: Axis) -> Markup:
    return _path("grid", "".join(f"{_move(0, y.place(value))}H{SIDE}" for value, _ in y.ticks))


def _through(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """A path along the points."""
    return "".join(_move(x.place(a), y.place(b), "L" if i else "M") for i, (a, b) in enumerate(points))


def _at_each(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return "".join(f"{_move(x.place(a), y.place(b))}h0" for a, b in points)


def _move(x: float, y: float, to: str = "M") -> str:
    """From fractions of the drawing, `y` upwards."""
    return f"{to}{_c(x)} {_c(1 - y)}"


def _c(fraction: float) -> str:
    """A coordinate."""
    return f"{fraction * SIDE:.1f}".removesuffix(".0")
