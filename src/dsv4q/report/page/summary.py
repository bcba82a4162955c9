"""The run in short: what was made of what, how large, how long, with which settings."""

from __future__ import annotations

import json
from collections.abc import Callable

from dsv4q.console import human_bytes, human_seconds
from dsv4q.report.page.inputs import Inputs
from dsv4q.report.page.markup import Column, Html, Unit, el, facts, join, table
from dsv4q.report.page.node import Gap, Node
from dsv4q.report.page.parts import and_list, counted
from dsv4q.report.page.weights import activation_settings

Tile = tuple[str, Callable[[], tuple[Html | str, str | None]]]


def tiles(inputs: Inputs) -> list[Html]:
    """The figures to know first. One that is not there says so in its tile."""
    report = inputs.report
    wanted: list[Tile] = [
        ("size", lambda: _size(report)),
        ("tensors", lambda: _tensors(report)),
        ("quantized linears exact", lambda: _exact(report)),
        ("shards", lambda: (f"{len(list(report.get('artifact').get('shards'))):,}", None)),
        ("time", lambda: _time(report)),
        ("peak memory", lambda: _memory(report)),
        ("experts without tokens", lambda: _unreached(report)),
        ("verification", lambda: _verdict(inputs)),
    ]
    return [el("dl", {"class": "tiles"}, *(_tile(name, value) for name, value in wanted))]


def _tile(name: str, value: Callable[[], tuple[Html | str, str | None]]) -> Html:
    try:
        shown, more = value()
    except Gap as gap:
        shown, more = "–", f"not shown: {gap}"
    return el("div", {"class": "tile"}, el("dt", None, name), el("dd", None, shown),
              el("dd", None, more) if more is not None else None)  # fmt: skip


def _size(report: Node) -> tuple[str, str]:
    source = human_bytes(report.get("source").integer("bytes"))
    return human_bytes(report.get("artifact").integer("bytes")), f"from {source}"


def _tensors(report: Node) -> tuple[str, str]:
    artifact = report.get("artifact")
    return f"{artifact.integer('tensors'):,}", f"{artifact.integer('mtp_tensors'):,} of them mtp.*"


def _exact(report: Node) -> tuple[str, str]:
    found = [one for _, one in report.get("errors").items()]
    return f"{sum(one.integer('exact') for one in found):,}", f"of {sum(one.integer('tensors') for one in found):,}"


def _time(report: Node) -> tuple[str, str]:
    ranks = report.maybe("ranks")
    count = 1 if ranks is None else len(list(ranks))
    more = "the last process of the run" if count <= 1 else f"the last start of the run, {count} ranks"
    return human_seconds(report.get("seconds").seconds("this_process")), more


def _memory(report: Node) -> tuple[str, str | None]:
    peak = report.get("peak_memory")
    gpu = f"host; {human_bytes(peak.integer('gpu'))} GPU" if peak.maybe("gpu") else "host; no GPU"
    return human_bytes(peak.integer("host")), gpu


def _unreached(report: Node) -> tuple[str, str]:
    found = report.get("coverage").items()
    if not found:
        return "–", "no data was used"
    return f"{sum(one.integer('unreached') for _, one in found):,}", f"in {len(found)} layers"


def _verdict(inputs: Inputs) -> tuple[Html | str, str]:
    found, when = (inputs.saved, "saved result") if inputs.saved is not None else (inputs.checked, "of this page")
    if not isinstance(found, Node):
        return "not done", "see Verification"
    wrong = found.integer("difference_count")
    text = "good" if not wrong else counted(wrong)
    depth = "every value" if found.get("checks").maybe("scales") else "headers"
    return el("span", {"class": "good" if not wrong else "bad"}, text), f"{depth}; {when}"


# ------------------------------------------------------------------------------------------------ what of what


def origin(report: Node) -> list[Html]:
    """Source, draft, data and activations."""
    source = report.get("source")
    forms = ", ".join(f"{found.as_number():,.0f} {form}" for form, found in source.get("forms").items())
    rows: list[tuple[str, Html | str | None]] = [
        ("source", el("code", None, source.text("path"))),
        ("layout", f"{source.text('layout')}: {source.integer('tensors'):,} tensors ({forms}), "
                   f"{human_bytes(source.integer('bytes'))}"),
        ("MTP draft", _draft(report)),
        ("quantized", and_list([f"{found.as_number():,.0f} linears as {group}"
                                for group, found in report.get("artifact").get("quantized_linears").items()])),
        ("calibration", _calibration(report)),
        ("activations", activation_settings(report)),
    ]  # fmt: skip
    return [facts(rows)]


def _draft(report: Node) -> str:
    artifact = report.get("artifact")
    count = artifact.integer("mtp_tensors")
    return f"{count:,} tensors, {human_bytes(artifact.integer('mtp_bytes'))}" if count else "left out"


def _calibration(report: Node) -> str:
    found = report.maybe("calibration")
    if found is None:
        return "none was needed"
    return (
        f"{found.integer('tokens'):,} tokens: {found.integer('samples'):,} samples of {found.integer('max_length'):,}, "
        f"micro-batches of {found.integer('micro_batch'):,}, from {found.text('source')}"
    )


def settings(report: Node) -> list[Html]:
    """Versions, machine and the config that decided the bytes."""
    identity = report.get("identity")
    rows: list[tuple[str, Html | str | None]] = [
        ("versions", ", ".join(f"{name} {json.dumps(found.value).strip(chr(34))}"
                               for name, found in identity.get("versions").items())),
        ("device", identity.text("device")),
        ("threads", f"{identity.integer('threads')}"),
    ]  # fmt: skip
    data = identity.maybe("data")
    if data is not None:
        rows.append(("data digest", el("code", None, data.text("digest"))))
    config = json.dumps(identity.get("config").value, indent=1, ensure_ascii=False)
    shown = el("details", {"class": "config"}, el("summary", None, "The config"), el("pre", {"tabindex": 0}, config))
    return [facts(rows), shown]


# ------------------------------------------------------------------------------------------------ sizes


def sizes(report: Node) -> list[Html]:
    """Tensors and bytes by class, before and after."""
    before, after = report.get("source").get("classes"), report.get("artifact").get("classes")
    names = list(dict.fromkeys([*(name for name, _ in after.items()), *(name for name, _ in before.items())]))
    whole = max([1, *(found.integer("bytes") for _, found in (*before.items(), *after.items()))])
    unit = Unit.for_bytes(whole / 1000)
    rows: list[list[str | None]] = []
    for name in names:
        both = [before.maybe(name), after.maybe(name)]
        nbytes = ["–" if found is None else unit.of(found.integer("bytes")) for found in both]
        tensors = ["–" if found is None else f"{found.integer('tensors'):,}" for found in both]
        rows.append([name, *nbytes, _bars(both, whole), *tensors])
    columns = [Column("class", False), Column(f"source, {unit.name}"), Column(f"artifact, {unit.name}"),
               Column("source over artifact", False), Column("source tensors"), Column("artifact tensors")]  # fmt: skip
    return [table("Tensors by class, ordered by size in the artifact", columns, rows)]


def _bars(found: list[Node | None], whole: int) -> Html:
    bars = [
        el("rect", {"class": f"c{(6, 0)[i]} fill", "y": i * 6, "width": f"{100 * one.integer('bytes') / whole:.2f}",
                    "height": 5})
        for i, one in enumerate(found)
        if one is not None
    ]  # fmt: skip
    return el("svg", {"class": "bar", "viewBox": "0 0 100 11", "preserveAspectRatio": "none", "aria-hidden": "true"},
              join(*bars))  # fmt: skip
