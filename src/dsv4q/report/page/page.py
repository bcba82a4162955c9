"""The whole page, in the order in which it is read: views of the report, shown by page.html."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dsv4q import __version__
from dsv4q.report.page.checks import acceptance, evaluation, residual, verification
from dsv4q.report.page.coverage import coverage
from dsv4q.report.page.inputs import Inputs
from dsv4q.report.page.record import Gap, Record, shown_or_gap
from dsv4q.report.page.summary import origin, settings, shards, sizes, tiles
from dsv4q.report.page.timing import block_times, memory_over_time, memory_peaks, ranks, stage_totals
from dsv4q.report.page.weights import input_scales, weight_chart, weight_totals, worst_tensors

GENERATOR = "dsv4q report"
"""In the page's head: tells that a file is ours to overwrite."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and lone surrogates, which have no form in HTML."""

View = tuple[Callable[..., dict[str, Any] | None], Record | Gap, *tuple[object, ...]]
"""What makes the values of a macro of _views.html that has its name, and of what."""


@dataclass(frozen=True)
class Section:
    """A headed part of the page."""

    id: str
    link: str
    title: str
    views: list[View]


def build_page(inputs: Inputs) -> tuple[str, list[str]]:
    """The page as HTML, and what it marks as missing.

    Parts whose data is not there, or not of the form that this version knows, are marked in their place.
    """
    gaps: dict[str, None] = {}
    sections = [(section, _shown(section.views, gaps)) for section in _sections(inputs) if section.views]
    page = _template().render(name=inputs.name, generator=GENERATOR, version=__version__, sections=sections)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", page), list(gaps)


@cache
def _template() -> Template:
    loader = PackageLoader("dsv4q.report.page", "")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return found.get_template("page.html")


def _sections(inputs: Inputs) -> list[Section]:
    """All there can be; those without views are left out."""
    report = inputs.report
    weights: list[View] = [(weight_totals, report), (weight_chart, report), (worst_tensors, report)]
    return [
        Section("summary", "Summary", "Summary", [(tiles, report, inputs), (origin, report)]),
        Section("weights", "Weight error", "Weight error", weights),
        Section("experts", "Experts", "Expert coverage", [(coverage, report, inputs.config)]),
        Section("inputs", "Input scales", "Input scales against their bound", [(input_scales, report)]),
        Section("evaluation", "Evaluation", "Evaluation", _evaluation(inputs)),
        Section("verification", "Verification", "Verification", _verification(inputs)),
        Section("time", "Time", "Time", [(stage_totals, report), (block_times, report)]),
        Section("memory", "Memory", "Memory", [(memory_peaks, report), (memory_over_time, report)]),
        Section("ranks", "Ranks", "Ranks", _ranks(report)),
        Section("sizes", "Sizes", "Sizes", [(sizes, report)]),
        Section("shards", "Shards", "Shards", [(shards, report, inputs.shards)]),
        Section("settings", "Settings", "Settings", [(settings, report)]),
    ]


def _evaluation(inputs: Inputs) -> list[View]:
    found = inputs.evaluation
    return [] if found is None else [(evaluation, found), (acceptance, found), (residual, found)]


def _verification(inputs: Inputs) -> list[View]:
    now = "When this page was made"
    checked = Gap("none was made") if inputs.checked is None else inputs.checked
    found: list[View] = [(verification, Gap(f"{now}: {checked}") if isinstance(checked, Gap) else checked, now)]
    return found if inputs.saved is None else [(verification, inputs.saved, "Saved result"), *found]


def _ranks(report: Record) -> list[View]:
    found = report.get("ranks")
    return [(ranks, report)] if isinstance(found, list) and len(found) > 1 else []


def _shown(views: list[View], gaps: dict[str, None]) -> list[tuple[str, dict[str, Any]]]:
    """Macros and their values; what several views lack is said once."""
    shown: list[tuple[str, dict[str, Any]]] = []
    for view, record, *more in views:
        try:
            values = shown_or_gap(view, record, *more)
        except Gap as gap:
            gaps[str(gap)] = None
            values = {"text": str(gap)}
            if ("gap", values) not in shown:
                shown.append(("gap", values))
            continue
        if values is not None:
            shown.append((view.__name__, values))
    return shown
