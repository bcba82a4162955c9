"""Colours of the page in both modes. Told apart without red and green: every series has a shape or an order as well.

Texts have a contrast of at least 4.5 with what is behind them, lines and bars of at least 3
(WCAG 2.2, 1.4.3 and 1.4.11).
"""

from __future__ import annotations

LIGHT = {
    "bg": "#ffffff", "panel": "#f3f5f8", "line": "#d3d9e1", "text": "#15181d", "soft": "#505a67", "link": "#1d5494",
    "good": "#0b6b50", "bad": "#a8201f", "gap": "#7a5200",
    "c0": "#2563a8", "c1": "#c2501d", "c2": "#0f8060", "c3": "#8b3fa0", "c4": "#8a6d00", "c5": "#b02a5b",
    "c6": "#4b5563", "c7": "#0b7c94",
}  # fmt: skip
DARK = {
    "bg": "#15181d", "panel": "#1f242b", "line": "#3a424d", "text": "#e8ebef", "soft": "#a9b3bf", "link": "#8ec2f7",
    "good": "#5fd0a5", "bad": "#ff9089", "gap": "#e8b84a",
    "c0": "#6fb1f0", "c1": "#f2935c", "c2": "#4fc79c", "c3": "#d08be6", "c4": "#d9b93b", "c5": "#f07ba5",
    "c6": "#a7b0bd", "c7": "#4cc3dd",
}  # fmt: skip
SERIES = 8
NOTHING = "#ff5a36"
"""An expert without tokens, on the heat map; not on the scale below."""

_VIRIDIS = (
    "440154", "481a6c", "472f7d", "414487", "39568c", "31688e", "2a788e", "23888e", "1f988b", "22a884", "35b779",
    "54c568", "7ad151", "a5db36", "d2e21b", "fde725",
)  # fmt: skip
"""Sixteen even steps of viridis (S. van der Walt, N. Smith; CC0), which grows lighter all along."""


def scale(steps: int) -> list[tuple[int, int, int]]:
    """`steps` colours from dark to light, R, G and B from 0 to 255."""
    known = [tuple(int(c[i : i + 2], 16) for i in (0, 2, 4)) for c in _VIRIDIS]
    found = []
    for step in range(steps):
        place = step / max(steps - 1, 1) * (len(known) - 1)
        low = min(int(place), len(known) - 2)
        part = place - low
        r, g, b = (round(one + (two - one) * part) for one, two in zip(known[low], known[low + 1], strict=True))
        found.append((r, g, b))
    return found


def rgb(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` -> R, G, B."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
