"""The page: page.html says what there is on it, in the order in which it is read; here is what fills it in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, UndefinedError
from markupsafe import Markup

from dsv4q import __version__
from dsv4q.console import human_bytes, human_seconds
from dsv4q.report.page import charts, errors, experts, heatmap, record, summary, timing, wording
from dsv4q.report.page.inputs import Inputs
from dsv4q.report.page.record import Gap, Record

GENERATOR = "dsv4q report"
"""In the page's head: tells that a file is ours to overwrite."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and lone surrogates, which have no form in HTML."""
_MALFORMED = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, UndefinedError)
"""What comes of reading a value as something that it is not."""

_FILTERS: tuple[Callable[..., str], ...] = (
    wording.percent, wording.short, wording.fixed, wording.counted, human_bytes, human_seconds, summary.shard_number,
    summary.span, charts.by_side,
)  # fmt: skip
"""How the templates write numbers and names."""
_GLOBALS = {
    "errors": errors, "experts": experts, "heatmap": heatmap, "record": record, "summary": summary, "timing": timing,
    "wording": wording, "enumerate": enumerate, "dumps": partial(json.dumps, ensure_ascii=False),
}  # fmt: skip
"""What the templates call, the modules by name."""

View = tuple[Any, Record | Gap, *tuple[object, ...]]
"""A macro, the record that it shows, and what else it needs."""


def build_page(inputs: Inputs) -> tuple[str, list[str]]:
    """The page as HTML, and what it marks as missing.

    Parts whose data is not there, or not of the form that this version knows, are marked in their place.
    """
    gaps: dict[str, None] = {}
    parts = partial(_parts, gaps)
    page = _template().render(inputs=inputs, generator=GENERATOR, version=__version__, parts=parts)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", page), list(gaps)


@cache
def _template() -> Template:
    loader = PackageLoader("dsv4q.report.page", "")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {one.__name__: one for one in _FILTERS}
    found.globals |= _GLOBALS | {"shown": shown}
    return found.get_template("page.html")


def shown(macro: Any, of: Record | Gap, *more: object) -> Markup | Gap:
    """What a macro of a template makes of a record.

    If there is none, it lacks something, or something in it is of another type, then that, as a `Gap`.
    """
    if isinstance(of, Gap):
        return of
    try:
        return macro(of, *more)
    except Gap as gap:
        return gap
    except _MALFORMED:
        # files can be edited by hand: what a macro trips over is in the file, as the tests of whole ones show
        return Gap(f"{of.name} has no {macro.name.replace('_', ' ')} that this version can read")


def _parts(gaps: dict[str, None], views: Sequence[View]) -> list[Markup | Gap]:
    """The views of a section; what several of them lack is said once."""
    found = {str(part): part for part in (shown(*view) for view in views)}
    gaps |= {text: None for text, part in found.items() if isinstance(part, Gap)}
    return list(found.values())
