"""A heat map as one small PNG with a pixel for each cell, stretched without smoothing. PNG: RFC 2083."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

STEPS = 64
"""Colours of the scale; index 0 of the palette is for cells that hold nothing."""
NOTHING = (0xFF, 0x5A, 0x36)
"""Colour of a cell with zero, not on the scale; `.nothing` in page.css."""

_VIRIDIS = (
    "440154", "481a6c", "472f7d", "414487", "39568c", "31688e", "2a788e", "23888e", "1f988b", "22a884", "35b779",
    "54c568", "7ad151", "a5db36", "d2e21b", "fde725",
)  # fmt: skip
"""Sixteen even steps of viridis (S. van der Walt, N. Smith; CC0), which grows lighter all along."""


def scale(steps: int) -> list[tuple[int, int, int]]:
    """`steps` colours from dark to light, R, G and B from 0 to 255."""
    known = [bytes.fromhex(colour) for colour in _VIRIDIS]
    found = []
    for step in range(steps):
        place = step / max(steps - 1, 1) * (len(known) - 1)
        low = min(int(place), len(known) - 2)
        part = place - low
        r, g, b = (round(one + (two - one) * part) for one, two in zip(known[low], known[low + 1], strict=True))
        found.append((r, g, b))
    return found


def heat_map(cells: Sequence[Sequence[int]]) -> str:
    """Counts by row and column, on a logarithmic scale of colours; zero has a colour of its own.

    Args:
        cells: equally long rows, the topmost first.
    """
    least, most = _range(cells)
    return png([[_step(value, least, most) for value in row] for row in cells])


def ramp_labels(cells: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """Place in per cent, and count there, of labels beside the scale for `heat_map` of the same cells."""
    least, most = _range(cells)
    # a little away from both ends, so that no label leaves the page
    return [
        (f"{4 + 92 * place:.0f}", f"{round(least * (most / least) ** place):,}")
        for place in ([0, 0.25, 0.5, 0.75, 1] if most > least else [0])
    ]


def _range(cells: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Least count above zero, and the most."""
    counts = [value for row in cells for value in row if value > 0]
    return min(counts, default=1), max(counts, default=1)


def _step(value: int, least: int, most: int) -> int:
    if value <= 0:
        return 0
    part = math.log(value / least) / math.log(most / least) if most > least else 1.0
    return 1 + round(part * (STEPS - 1))


def png(rows: Sequence[Sequence[int]]) -> str:
    """A palette image as a `data:` address; values are palette indices 0 to `STEPS`."""
    palette = b"".join(bytes(colour) for colour in (NOTHING, *scale(STEPS)))
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
