"""Where the time and the memory of a run went: by stage, block and rank."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from dsv4q.console import human_bytes, human_seconds
from dsv4q.report.page.charts import Axis, Figure, Line, Tips, bar_chart, line_chart, linear_axis, names_axis
from dsv4q.report.page.record import Gap, Record
from dsv4q.report.page.wording import Unit, percent, seconds, short_name

STAGES = {
    "read": "waiting until the block's weights are on the device",
    "exchange": "weights from the other ranks",
    "check": "putting weights in place",
    "forward": "calibration batches through the block",
    "statistics": "finding the scales of inputs and modules",
    "encode": "encoding, comparing with the source, handing over",
    "write": "writing",
}
"""Stage -> what is done in it; one after the other. Others are shown as they are called."""
BESIDE = {"sync": "making the block durable, beside the next ones"}
DONE_AT = "done_at"

Times = list[tuple[str, dict[str, float]]]
"""Name of every block, and its seconds by stage."""


def _times(report: Record) -> Times:
    found = [(block["block"], block["seconds"]) for block in report["blocks"]]
    if not found:
        raise Gap(f"{report.name} has no blocks")
    return found


def _stages(times: Times) -> list[str]:
    """Stages that follow each other, in order."""
    there = {stage for _, spent in times for stage in spent} - {*BESIDE, DONE_AT}
    return [stage for stage in STAGES if stage in there] + sorted(there - STAGES.keys())


def on_disk_after(times: Times) -> list[float | None]:
    """Seconds of work until each block was on disk, over all processes of the run: a resumed one starts at 0 again."""
    found: list[float | None] = []
    base, last = 0.0, 0.0
    for _, spent in times:
        done = spent.get(DONE_AT)
        if done is None:
            found.append(None)
            continue
        if done < last:
            base += last
        last = done
        found.append(base + done)
    return found


def stage_totals(report: Record) -> dict[str, Any]:
    """Seconds by stage over all blocks."""
    times = _times(report)
    stages = _stages(times)
    sums = {stage: sum(spent.get(stage, 0.0) for _, spent in times) for stage in [*stages, *BESIDE]}
    whole = sum(sums[stage] for stage in stages)
    rows = [
        [stage, seconds(sums[stage]), percent(sums[stage] / whole) if whole else "–", STAGES.get(stage, "")]
        for stage in stages
    ]
    rows.append(["together", seconds(whole), "100 %" if whole else "–", ""])
    beside = {stage: what for stage, what in BESIDE.items() if any(stage in spent for _, spent in times)}
    rows += [[stage, seconds(sums[stage]), "beside", what] for stage, what in beside.items()]
    return {"wall": human_seconds(report["seconds"]["this_process"]), "rows": rows}


def block_times(report: Record) -> dict[str, Any]:
    """Stacked bars of every block, and how far apart the blocks came on disk."""
    times = _times(report)
    stages, done = _stages(times), on_disk_after(times)
    shown = (*stages, *BESIDE)
    totals = [sum(spent.get(stage, 0.0) for stage in stages) for _, spent in times]
    tips: list[tuple[float, str]] = []
    rows = []
    for (name, spent), total, at in zip(times, totals, done, strict=True):
        each = ", ".join(f"{stage} {spent[stage]:.2f}" for stage in shown if stage in spent)
        after = "" if at is None else f"; on disk after {at:,.1f} s"
        tips.append((len(tips) + 1, f"{name}: {total:.2f} s; {each}{after}"))
        rows.append([name, seconds(total), *(seconds(spent.get(stage)) for stage in shown), seconds(at)])
    slowest = max(range(len(times)), key=lambda column: totals[column])
    return {
        "title": f"{human_seconds(totals[slowest])} for the slowest block, {times[slowest][0]}",
        "first": times[0][0],
        "last": times[-1][0],
        "count": len(times),
        "chart": _block_chart(times, totals, tips),
        "heads": ["block", "stages", *shown, "on disk after"],
        "rows": rows,
    }


def _block_chart(times: Times, totals: list[float], tips: Tips) -> Figure:
    stacks = [
        (stage, (*STAGES, stage).index(stage) % 8, [spent.get(stage, 0.0) for _, spent in times])
        for stage in _stages(times)
    ]
    apart = _apart(times)
    known = [value for value in apart if value is not None]
    marks = ("from the block before on disk to this one", apart) if known else None
    x = names_axis([short_name(name) for name, _ in times], "block")
    y = linear_axis(max([*totals, *known]), lambda value: f"{value:.3g} s", "seconds")
    return bar_chart(x, y, stacks, marks, tips)


def _apart(times: Times) -> list[float | None]:
    """Seconds from the block before on disk to this one, in one process."""
    found = [times[0][1].get(DONE_AT)]
    for (_, before), (_, spent) in pairwise(times):
        one, two = before.get(DONE_AT), spent.get(DONE_AT)
        # a resumed run begins its clock anew, and what passed before that is not known
        found.append(None if one is None or two is None or two < one else two - one)
    return found


# ------------------------------------------------------------------------------------------------ memory

CALLED = {"host": "host, resident", "gpu": "GPU, allocated"}


def memory_peaks(report: Record) -> dict[str, Any]:
    """Peaks of the whole run."""
    peak = report["peak_memory"]
    return {"host": human_bytes(peak["host"]), "gpu": human_bytes(peak["gpu"]) if peak.get("gpu") is not None else None}


def memory_over_time(report: Record) -> dict[str, Any]:
    """Memory when each block was on disk."""
    after = on_disk_after(_times(report))
    samples = [
        (at, block["block"], block["memory"])
        for block, at in zip(report["blocks"], after, strict=True)
        if at is not None and block.get("memory") is not None
    ]
    if len(samples) < 2:
        raise Gap(f"{report.name} has no samples of memory over time (blocks[].memory)")
    called = {
        kind: name for kind, name in CALLED.items() if any(memory.get(kind) is not None for _, _, memory in samples)
    }
    points = {
        kind: [(at, memory[kind] / 1e9) for at, _, memory in samples if memory.get(kind) is not None] for kind in called
    }
    most = {kind: max(y for _, y in found) for kind, found in points.items()}
    end = max(at for at, _, _ in samples)
    ticks = linear_axis(end, _time_label(end), "").ticks
    x = Axis(0.0, end, tuple(tick for tick in ticks if tick[0] <= end * 0.97), title="time since the start")
    y = linear_axis(max(most.values()), lambda value: f"{value:.3g} GB", "GB")
    lines = [Line(name, points[kind], colour) for colour, (kind, name) in enumerate(called.items())]
    tips = []
    for at, block, memory in samples:
        used = [f"{name} {human_bytes(memory[kind])}" for kind, name in called.items() if memory.get(kind) is not None]
        tips.append((at, f"{block} after {at:,.1f} s: {', '.join(used)}"))
    unit = Unit.for_bytes(max(most.values()) * 1e9)
    return {
        "title": "At most " + ", ".join(f"{most[kind]:.3g} GB {name}" for kind, name in called.items()),
        "chart": line_chart(x, y, lines, tips),
        "heads": ["block", "after, s", *(f"{name}, {unit.name}" for name in called.values())],
        "rows": [
            [block, seconds(at), *(unit.of(memory.get(kind)) for kind in called)] for at, block, memory in samples
        ],
    }


def _time_label(end: float) -> Callable[[float], str]:
    if end >= 7200:
        return lambda value: f"{value / 3600:.3g} h"
    return (lambda value: f"{value / 60:.3g} min") if end >= 180 else (lambda value: f"{value:.3g} s")


# ------------------------------------------------------------------------------------------------ ranks


def ranks(report: Record) -> dict[str, Any]:
    """What each of several ranks did."""
    found = report["ranks"]
    unit = Unit.for_bytes(max(rank[key] for rank in found for key in ("read_bytes", "write_bytes")))
    rows = []
    for rank in found:
        peak = rank.get("peak_memory") or {}
        rows.append(
            [f"{rank['rank']}", unit.of(rank["read_bytes"]), f"{rank['micro_batches']:,}",
             f"{rank['encoded_linears']:,}", unit.of(rank["write_bytes"]), unit.of(peak.get("host")),
             unit.of(peak.get("gpu"))]
        )  # fmt: skip
    return {"unit": unit.name, "rows": rows}
