"""The whole page, in the order in which it is read."""

from __future__ import annotations

from dsv4q import __version__
from dsv4q.report.page import checks, coverage, shards, summary, timing, weights
from dsv4q.report.page.inputs import Inputs
from dsv4q.report.page.markup import Html, el, join
from dsv4q.report.page.node import Gap, Node
from dsv4q.report.page.parts import Parts
from dsv4q.report.page.style import style_sheet

GENERATOR = "dsv4q report"
"""In the page's head: tells that a file is ours to overwrite."""


def build_page(inputs: Inputs) -> tuple[str, list[str]]:
    """The page as HTML, and what it marks as missing.

    Parts whose data is not there, or not of the form that this version knows, are marked in their place.
    """
    parts = Parts()
    report = inputs.report
    sections = [
        ("summary", "Summary", parts.section(
            "summary", "Summary", lambda: summary.tiles(inputs), lambda: summary.origin(report))),
        ("weights", "Weight error", parts.section(
            "weights", "Weight error", lambda: weights.weight_totals(report), lambda: weights.weight_chart(report),
            lambda: weights.worst_tensors(report))),
        ("experts", "Experts", parts.section(
            "experts", "Expert coverage", lambda: coverage.coverage(report, inputs.config))),
        ("inputs", "Input scales", parts.section(
            "inputs", "Input scales against their bound", lambda: weights.input_scales(report))),
        ("evaluation", "Evaluation", _evaluation(inputs, parts)),
        ("verification", "Verification", _verification(inputs, parts)),
        ("time", "Time", parts.section(
            "time", "Time", lambda: timing.stage_totals(report), lambda: timing.block_times(report))),
        ("memory", "Memory", parts.section(
            "memory", "Memory", lambda: timing.memory_peaks(report), lambda: timing.memory_over_time(report))),
        ("ranks", "Ranks", _ranks(report, parts)),
        ("sizes", "Sizes", parts.section("sizes", "Sizes", lambda: summary.sizes(report))),
        ("shards", "Shards", parts.section("shards", "Shards", lambda: shards.shard_map(report, inputs.shards))),
        ("settings", "Settings", parts.section("settings", "Settings", lambda: summary.settings(report))),
    ]  # fmt: skip
    shown = [(name, link, section) for name, link, section in sections if section is not None]
    links = el("ul", None, *(el("li", None, el("a", {"href": f"#{name}"}, link)) for name, link, _ in shown))
    body = join(
        el("header", None, el("h1", None, inputs.name), el("p", {"class": "soft"}, "Report of a quantization")),
        el("nav", {"aria-label": "Parts of this page"}, links),
        el("main", None, *(section for _, _, section in shown)),
        el("footer", None, el("p", None, f"Made by dsv4q {__version__} from report.json, which has every number.")),
    )
    return _document(inputs.name, body), parts.gaps


def _document(name: str, body: Html) -> str:
    head = join(
        el("meta", {"charset": "utf-8"}),
        el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("meta", {"name": "generator", "content": GENERATOR}),
        el("meta", {"name": "color-scheme", "content": "light dark"}),
        el("title", None, f"{name}: report of a quantization"),
        el("style", None, Html(style_sheet())),
    )
    return "<!doctype html>\n" + el("html", {"lang": "en"}, el("head", None, head), el("body", None, body)) + "\n"


def _evaluation(inputs: Inputs, parts: Parts) -> Html | None:
    found = inputs.evaluation
    if found is None:
        return None

    def sound() -> Node:
        if isinstance(found, Gap):
            raise found
        return found

    return parts.section(
        "evaluation", "Evaluation", lambda: checks.evaluation(sound()), lambda: checks.acceptance(sound()),
        lambda: checks.residual(sound()),
    )  # fmt: skip


def _verification(inputs: Inputs, parts: Parts) -> Html:
    now = [lambda: checks.verification(inputs.checked, "When this page was made")]
    if inputs.saved is not None:
        now.insert(0, lambda: checks.verification(inputs.saved, "Saved result"))
    return parts.section("verification", "Verification", *now)


def _ranks(report: Node, parts: Parts) -> Html | None:
    found = report.maybe("ranks")
    if found is None or not isinstance(found.value, list) or len(found.value) < 2:
        return None
    return parts.section("ranks", "Ranks", lambda: timing.ranks(list(found)))
