"""A heat map as one small PNG with a pixel for each cell, stretched without smoothing. PNG: RFC 2083."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

from dsv4q.report.page.charts import SIDE, Axis, Frame, figure, legend_box
from dsv4q.report.page.colours import NOTHING, rgb, scale
from dsv4q.report.page.markup import Html, el

STEPS = 64
"""Colours of the scale; index 0 of the palette is for cells that hold nothing."""


def heat_map(frame: Frame, cells: Sequence[Sequence[int]], rows: Sequence[str], beside: Html | None) -> Html:
    """Counts by row and column, on a logarithmic scale of colours; zero has a colour of its own.

    Args:
        cells: equally long rows, the topmost first.
        rows: a tooltip for each row.
        beside: HTML inside the labels of the y axis.
    """
    most = max((value for row in cells for value in row), default=0)
    least = min((value for row in cells for value in row if value > 0), default=1)
    indices = [[_step(value, least, most) for value in row] for row in cells]
    image = el(
        "image",
        {"href": png(indices), "width": SIDE, "height": SIDE, "preserveAspectRatio": "none"},
    )
    height = SIDE / max(len(rows), 1)
    titles = [
        el("rect", {"y": f"{height * i:.2f}", "width": SIDE, "height": f"{height:.2f}"}, el("title", None, text))
        for i, text in enumerate(rows)
    ]
    return figure(frame, image, el("g", {"class": "hit"}, *titles), beside=beside)


def ramp(cells: Sequence[Sequence[int]], unit: str) -> Html:
    """The scale of a heat map's colours, and the colour of zero if there is one."""
    values = [value for row in cells for value in row]
    least, most = min((v for v in values if v > 0), default=1), max(values, default=1)
    strip = "".join(
        el("rect", {"x": i, "width": 1.05, "height": 1, "fill": "#{:02x}{:02x}{:02x}".format(*colour)})
        for i, colour in enumerate(scale(STEPS))
    )
    svg = el("svg", {"viewBox": f"0 0 {STEPS} 1", "preserveAspectRatio": "none", "aria-hidden": "true"}, Html(strip))
    places = [i / 4 for i in range(5)] if most > least else [0.0]
    labels = [(p, round(least * (most / least) ** p)) for p in places]
    below = [el("span", {"style": f"left:{_inside(p)}%"}, f"{value:,}") for p, value in labels]
    zero = el("ul", {"class": "legend"}, legend_box(f"no {unit}", None, "nothing")) if 0 in values else None
    return el("div", {"class": "ramp"}, svg, el("div", {"class": "x"}, *below),
              el("div", {"class": "xt"}, f"{unit} (logarithmic)"), zero)  # fmt: skip


def _inside(place: float) -> str:
    """A little away from both ends, so that the label does not leave the page."""
    return f"{4 + 92 * place:.0f}"


def _step(value: int, least: int, most: int) -> int:
    if value <= 0:
        return 0
    part = math.log(value / least) / math.log(most / least) if most > least else 1.0
    return 1 + round(part * (STEPS - 1))


def png(rows: Sequence[Sequence[int]]) -> str:
    """A palette image as a `data:` address; values are palette indices 0 to `STEPS`."""
    palette = b"".join(bytes(colour) for colour in (rgb(NOTHING), *scale(STEPS)))
    width, height = len(rows[0]) if rows else 1, len(rows) or 1
    lines = b"".join(b"\0" + bytes(row) for row in rows) or b"\0\0"
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def rows_axis(count: int, skip: int) -> Axis:
    """Labels of rows 0, 10, 20 … from the top, or of all if there are few; without the first `skip` ones."""
    every = 1 if count <= 12 else 10
    labels = tuple((count - i - 0.5, str(i)) for i in range(skip, count) if i % every == 0)
    return Axis(0.0, float(max(count, 1)), labels)
