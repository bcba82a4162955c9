"""Charts as inline SVG in a frame of HTML.

The drawing is stretched to the width there is, so it holds no text; ticks and legends are HTML around it and keep the
page's own size of letters on a phone and on paper. Coordinates inside run from 0 to 1000 in both directions. What a
chart shows stands in its `aria-label`, its values in tooltips (`<title>`) and in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsv4q.report.page.markup import Html, el, join

SIDE = 1000
_SHAPES: tuple[str | None, ...] = (None, "7 4", "2 4", "10 3 2 3")
"""Dashes of the lines, so that colour alone tells nothing."""


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


def linear_axis(high: float, label: Callable[[float], str], title: str) -> Axis:
    """From 0 to a round number that is not below `high`."""
    high = high if high > 0 else 1.0
    step = next(s for s in _round_numbers(high / 5) if s >= high / 5)
    count = math.ceil(high / step - 1e-9)
    return Axis(0.0, step * count, tuple((step * i, label(step * i)) for i in range(count + 1)), title=title)


def _round_numbers(near: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(near))
    return [power, 2 * power, 5 * power, 10 * power, 20 * power]


def log_axis(low: float, high: float, label: Callable[[float], str], title: str) -> Axis:
    """Whole powers of ten around two positive values."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    powers = tuple((10.0**p, label(10.0**p)) for p in range(first, last + 1))
    return Axis(10.0**first, 10.0**last, powers, log=True, title=title)


def names_axis(names: Sequence[str], title: str) -> Axis:
    """One column for each name. Few are all named, of many those that are multiples of ten."""
    count = len(names)
    if count <= 10:
        ticks = tuple((i + 0.5, name) for i, name in enumerate(names))
    else:
        ticks = tuple((i + 0.5, name) for i, name in enumerate(names) if name.isdecimal() and int(name) % 10 == 0)
    return Axis(0.0, float(max(count, 1)), ticks, title=title)


@dataclass(frozen=True)
class Line:
    """A series of points, drawn as line and dots; `band` are (x, low, high)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Frame:
    """What surrounds a drawing."""

    title: str
    """Says what is seen."""
    note: str
    """How to read it, with units."""
    described: str
    """The text alternative."""
    x: Axis
    y: Axis
    height: str = "14rem"
    legend: Sequence[Html] = field(default_factory=tuple)
    classes: str | None = None


def figure(frame: Frame, *drawing: Html, beside: Html | None = None) -> Html:
    """A titled chart.

    Args:
        drawing: SVG elements in coordinates of 0 to 1000, y downwards.
        beside: HTML inside the labels of the y axis.
    """
    svg = el(
        "svg",
        {"viewBox": f"0 0 {SIDE} {SIDE}", "preserveAspectRatio": "none", "role": "img",
         "aria-label": frame.described},
        *drawing,
    )  # fmt: skip
    left = [el("span", {"style": f"bottom:{100 * frame.y.place(v):.2f}%"}, text) for v, text in frame.y.ticks]
    below = [el("span", {"style": f"left:{100 * frame.x.place(v):.2f}%"}, text) for v, text in frame.x.ticks]
    widest = max((len(text) for _, text in frame.y.ticks), default=0)
    plot = el(
        "div",
        {"class": "plot", "style": f"--h:{frame.height};--w:{0.48 * widest + 0.3:.2f}rem"},
        el("div", {"class": "y", "aria-hidden": "true"}, *left, beside),
        el("div", {"class": "area"}, svg),
        el("div", {"class": "x", "aria-hidden": "true"}, *below),
        el("div", {"class": "xt", "aria-hidden": "true"}, frame.x.title),
    )
    head = el("figcaption", None, el("b", None, frame.title), el("span", None, frame.note))
    legend = el("ul", {"class": "legend"}, *frame.legend) if frame.legend else None
    return el("figure", {"class": frame.classes}, head, legend, plot)


def line_chart(frame: Frame, lines: Sequence[Line], titles: Sequence[tuple[float, float, str]]) -> Html:
    """Lines over a grid.

    Args:
        titles: tooltips, each with the x values that it reaches from and to.
    """
    x, y = frame.x, frame.y
    drawn = [_grid(y)]
    for number, line in enumerate(lines):
        known = [(a, b) for a, b in line.points if math.isfinite(b)]
        if line.band:
            around = [(a, low) for a, low, _ in line.band] + [(a, high) for a, _, high in reversed(line.band)]
            drawn.append(el("path", {"class": f"band c{line.colour}", "d": _path(around, x, y) + "z"}))
        inner = [el("path", {"class": "stroke", "d": _path(known, x, y), "stroke-dasharray": _dash(number)})]
        if len(known) <= 150:
            inner.append(el("path", {"class": _dot(number), "d": _dots(known, x, y)}))
        drawn.append(el("g", {"class": f"c{line.colour}"}, *inner))
    legend = [legend_line(line.name, line.colour, number) for number, line in enumerate(lines)]
    return figure(_with_legend(frame, legend), *drawn, hits(titles, x))


def bar_chart(
    frame: Frame,
    stacks: Sequence[tuple[str, int, Sequence[float]]],
    marks: tuple[str, Sequence[float | None]] | None,
    titles: Sequence[tuple[float, float, str]],
) -> Html:
    """Stacked bars, one for each column of the x axis.

    Args:
        stacks: name, colour and one value for each column, from below to the top.
        marks: name and values of something beside the stack, drawn as a line across its column.
    """
    columns = round(frame.x.high)
    below = [0.0] * columns
    drawn = [_grid(frame.y)]
    for _, colour, values in stacks:
        rects = []
        for column, value in enumerate(values):
            if value <= 0:
                continue
            top, bottom = frame.y.place(below[column] + value), frame.y.place(below[column])
            below[column] += value
            rects.append(_rect(frame.x.place(column + 0.1), top, 0.8 / columns, top - bottom))
        drawn.append(el("g", {"class": f"fill c{colour}"}, *rects))
    legend = [legend_box(name, colour) for name, colour, _ in stacks]
    if marks is not None:
        places = [(column, value) for column, value in enumerate(marks[1]) if value is not None]
        across = "".join(
            f"M{_c(frame.x.place(column + 0.02))} {_c(1 - frame.y.place(value))}h{_c(0.96 / columns)}"
            for column, value in places
        )
        drawn.append(el("path", {"class": "mark", "d": across}))
        legend.append(_legend(marks[0], el("path", {"class": "mark", "d": "M0 6h24"}), None))
    return figure(_with_legend(frame, legend), *drawn, hits(titles, frame.x))


def hits(titles: Sequence[tuple[float, float, str]], x: Axis) -> Html:
    """Invisible columns over a drawing that carry tooltips."""
    rects = []
    for start, end, text in titles:
        left, right = x.place(start), x.place(end)
        rects.append(_rect(left, 1.0, right - left, 1.0, text))
    return el("g", {"class": "hit"}, *rects)


def legend_box(name: str, colour: int | None, classes: str = "") -> Html:
    """Entry of a legend: a filled box."""
    box = el("rect", {"class": "fill", "width": 16, "height": 12, "x": 4})
    return _legend(name, box, f"c{colour}" if colour is not None else classes)


def legend_line(name: str, colour: int, number: int) -> Html:
    """Entry of a legend: the line with its dashes."""
    line = el("path", {"class": "stroke", "d": "M0 6h24", "stroke-dasharray": _dash(number)})
    return _legend(name, join(line, el("path", {"class": _dot(number), "d": "M12 6h0"})), f"c{colour}")


def _legend(name: str, drawing: Html, classes: str | None) -> Html:
    svg = el("svg", {"viewBox": "0 0 24 12", "class": classes, "aria-hidden": "true"}, drawing)
    return el("li", None, svg, name)


def _with_legend(frame: Frame, legend: Sequence[Html]) -> Frame:
    return Frame(frame.title, frame.note, frame.described, frame.x, frame.y, frame.height, [*frame.legend, *legend],
                 frame.classes)  # fmt: skip


def _grid(y: Axis) -> Html:
    lines = "".join(f"M0 {_c(1 - y.place(value))}H{SIDE}" for value, _ in y.ticks)
    return el("path", {"class": "grid", "d": lines})


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return "".join(
        f"{'L' if number else 'M'}{_c(x.place(a))} {_c(1 - y.place(b))}" for number, (a, b) in enumerate(points)
    )


def _dots(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return "".join(f"M{_c(x.place(a))} {_c(1 - y.place(b))}h0" for a, b in points)


def _rect(left: float, top: float, width: float, height: float, title: str | None = None) -> Html:
    """Fractions of the drawing; `top` counted from below."""
    attributes: dict[str, object] = {"x": _c(left), "y": _c(1 - top), "width": _c(width), "height": _c(height)}
    return el("rect", attributes, el("title", None, title) if title is not None else None)


def _dash(number: int) -> str | None:
    return _SHAPES[number % len(_SHAPES)]


def _dot(number: int) -> str:
    return "dot square" if number % 2 else "dot"


def _c(fraction: float) -> str:
    """A coordinate."""
    return f"{fraction * SIDE:.1f}".removesuffix(".0")
