"""HTML elements that escape all text and always close; tables and numbers as the whole page has them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_VOID = frozenset({"meta", "br", "hr", "link"})
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | None
"""A child of an element: `Html` goes in as it is, any other text is escaped, None is nothing."""


def el(tag: str, attributes: dict[str, object] | None = None, *children: Child) -> Html:
    """One element. Attributes that are None or False are left out; True is an attribute without a value."""
    given = "".join(
        f" {name}" if value is True else f' {name}="{html.escape(_clean(str(value)))}"'
        for name, value in (attributes or {}).items()
        if value is not None and value is not False
    )
    inner = join(*children)
    return Html(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{inner}</{tag}>")


def join(*children: Child) -> Html:
    """Several elements or texts, one after the other."""
    return Html(
        "".join(
            child if isinstance(child, Html) else html.escape(_clean(child), quote=False)
            for child in children
            if child is not None
        )
    )


def _clean(text: str) -> str:
    """Control characters and lone surrogates have no form in HTML."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True)
class Column:
    """Head of a table's column."""

    title: str
    numbers: bool = True
    """Aligned to the right, digits below digits."""
    wraps: bool = False
    """Long text, in several lines."""

    @property
    def classes(self) -> str | None:
        """For style."""
        return None if self.numbers else "t w" if self.wraps else "t"


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Child]]) -> Html:
    """A table that scrolls by itself where it is too wide; the first column names the row."""
    classes = [column.classes for column in columns]
    head = [el("th", {"scope": "col", "class": c}, col.title) for c, col in zip(classes, columns, strict=True)]
    body = [
        el(
            "tr", None,
            *(
                el("td" if i else "th", {"class": c, "scope": None if i else "row"}, cell)
                for i, (c, cell) in enumerate(zip(classes, row, strict=True))
            ),
        )
        for row in rows
    ]  # fmt: skip
    whole = el("table", None, el("caption", None, el("span", None, caption)), el("thead", None, el("tr", None, *head)),
               el("tbody", None, *body))  # fmt: skip
    return el("div", {"class": "scroll", "tabindex": 0, "role": "region", "aria-label": caption}, whole)


def numbers(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Child]]) -> Html:
    """A long table behind a line to open it; open in print."""
    return el("details", None, el("summary", None, f"Table: {caption}"), table(caption, columns, rows))


def facts(rows: Sequence[tuple[str, Child]]) -> Html:
    """Name and value pairs."""
    return el("dl", {"class": "facts"}, *(join(el("dt", None, n), el("dd", None, v)) for n, v in rows if v is not None))


def percent(share: float) -> str:
    """`8.12 %`; small ones with two digits that say something, exact zero as `0 %`."""
    if share == 0:
        return "0 %"
    if not math.isfinite(share):
        return "infinite"
    digits = 2 if abs(share) >= 0.0001 else min(12, 1 - math.floor(math.log10(abs(share) * 100)))
    return f"{share * 100:.{digits}f} %"


def short(value: float) -> str:
    """Four digits that say something, without an exponent where that is readable."""
    if not math.isfinite(value):
        return "infinite"
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) < 1e12 and abs(value) >= 1 else f"{value:.3e}"


def seconds(value: float) -> str:
    """For columns of a table: always two decimals."""
    return f"{value:,.2f}"


@dataclass(frozen=True)
class Unit:
    """Of the bytes in a column of a table; decimal, 1 GB = 1e9 bytes."""

    name: str
    size: float

    def of(self, nbytes: float) -> str:
        """Always three decimals."""
        return f"{nbytes / self.size:,.3f}"

    @classmethod
    def for_bytes(cls, largest: float) -> Unit:
        """One in which `largest` has at least one digit before the point, if there is one."""
        return next((unit for unit in _UNITS if largest >= unit.size), _UNITS[-1])


_UNITS = (Unit("GB", 1e9), Unit("MB", 1e6), Unit("kB", 1e3))
