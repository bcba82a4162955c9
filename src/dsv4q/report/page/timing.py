"""Where the time and the memory of a run went: by stage, block and rank."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from dsv4q.console import human_bytes
from dsv4q.report.page.charts import Axis, Chart, Line, linear_axis, names_axis, stacked
from dsv4q.report.page.record import Record, need
from dsv4q.report.page.wording import fixed, percent, short_name

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


def finished_blocks(report: Record) -> list[Record]:
    """Blocks in the order in which they were finished: those that are only copied come before the layers."""
    return sorted(report["blocks"], key=lambda block: block.get("finished", 0))


def times_of(report: Record) -> Times:
    """Of all blocks, in the order in which they were finished."""
    times = [(block["block"], block["seconds"]) for block in finished_blocks(report)]
    return need(times, f"{report.name} has no blocks")


def stages_of(times: Times) -> list[str]:
    """Stages that follow each other, in order."""
    there = {stage for _, spent in times for stage in spent} - {*BESIDE, DONE_AT}
    return [stage for stage in STAGES if stage in there] + sorted(there - STAGES.keys())


def stage_sums(times: Times) -> list[tuple[str, str, str, str]]:
    """Stage, its seconds over all blocks, their share of all stages, and what it is."""
    stages = stages_of(times)
    sums = {stage: sum(spent.get(stage, 0.0) for _, spent in times) for stage in [*stages, *BESIDE]}
    whole = sum(sums[stage] for stage in stages)
    rows = [(s, fixed(sums[s]), percent(sums[s] / whole) if whole else "–", STAGES.get(s, "")) for s in stages]
    rows.append(("together", fixed(whole), "100 %" if whole else "–", ""))
    beside = {stage: what for stage, what in BESIDE.items() if any(stage in spent for _, spent in times)}
    return rows + [(stage, fixed(sums[stage]), "beside", what) for stage, what in beside.items()]


def block_totals(times: Times) -> list[float]:
    """Seconds of all stages of each block."""
    stages = stages_of(times)
    return [sum(spent.get(stage, 0.0) for stage in stages) for _, spent in times]


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


def block_chart(times: Times) -> Chart:
    """Stacked bars of every block, and how far apart the blocks came on disk."""
    stages, totals = stages_of(times), block_totals(times)
    series = [
        (stage, (*STAGES, stage).index(stage) % 8, [spent.get(stage, 0.0) for _, spent in times]) for stage in stages
    ]
    apart = [(column, seconds) for column, seconds in enumerate(_apart(times)) if seconds is not None]
    tips = []
    for i, ((name, spent), total, at) in enumerate(zip(times, totals, on_disk_after(times), strict=True), 1):
        each = ", ".join(f"{stage} {spent[stage]:.2f}" for stage in (*stages, *BESIDE) if stage in spent)
        tips.append((i, f"{name}: {total:.2f} s; {each}" + ("" if at is None else f"; on disk after {at:,.1f} s")))
    return Chart(
        x=names_axis([short_name(name) for name, _ in times], "block"),
        y=linear_axis(max([*totals, *(seconds for _, seconds in apart)]), lambda value: f"{value:.3g} s", "seconds"),
        tips=tips,
        bars=stacked(series),
        marks=("from the block before on disk to this one", apart) if apart else None,
    )


def _apart(times: Times) -> list[float | None]:
    """Seconds from the block before on disk to this one, in one process."""
    found = [times[0][1].get(DONE_AT)]
    for (_, before), (_, spent) in pairwise(times):
        one, two = before.get(DONE_AT), spent.get(DONE_AT)
        # a resumed run begins its clock anew, and what passed before that is not known
        found.append(None if one is None or two is None or two < one else two - one)
    return found


# ------------------------------------------------------------------------------------------------ memory

Samples = list[tuple[float, str, Record]]
"""Seconds, the block that was on disk then, and the bytes in use by kind of memory."""


def memory_samples(report: Record) -> Samples:
    """Memory when each block was on disk."""
    samples = [
        (at, block["block"], block["memory"])
        for block, at in zip(finished_blocks(report), on_disk_after(times_of(report)), strict=True)
        if at is not None and block.get("memory") is not None
    ]
    return need(samples[1:] and samples, f"{report.name} has no samples of memory over time (blocks[].memory)")


def memory_lines(samples: Samples) -> list[tuple[str, Line]]:
    """Key of each kind of memory that was measured, and its bytes over time in GB."""
    found = []
    for colour, (kind, name) in enumerate({"host": "host, resident", "gpu": "GPU, allocated"}.items()):
        points = [(at, memory[kind] / 1e9) for at, _, memory in samples if memory.get(kind) is not None]
        if points:
            found.append((kind, Line(name, points, colour)))
    return found


def memory_chart(samples: Samples) -> Chart:
    """Memory over time."""
    kinds = memory_lines(samples)
    end = max(at for at, _, _ in samples)
    ticks = linear_axis(end, _time_label(end), "").ticks
    x = Axis(0.0, end, tuple(tick for tick in ticks if tick[0] <= end * 0.97), title="time since the start")
    most = max(line.highest for _, line in kinds)
    tips = []
    for at, block, memory in samples:
        used = [f"{line.name} {human_bytes(memory[kind])}" for kind, line in kinds if memory.get(kind) is not None]
        tips.append((at, f"{block} after {at:,.1f} s: {', '.join(used)}"))
    y = linear_axis(most, lambda value: f"{value:.3g} GB", "GB")
    return Chart(x, y, tips, lines=[line for _, line in kinds])


def _time_label(end: float) -> Callable[[float], str]:
    if end >= 7200:
        return lambda value: f"{value / 3600:.3g} h"
    return (lambda value: f"{value / 60:.3g} min") if end >= 180 else (lambda value: f"{value:.3g} s")
