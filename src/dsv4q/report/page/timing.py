"""Where the time and the memory of a run went: by stage, block and rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from dsv4q.console import human_bytes, human_seconds
from dsv4q.report.page.charts import Axis, Frame, Line, bar_chart, line_chart, linear_axis, names_axis
from dsv4q.report.page.markup import Column, Html, Unit, el, numbers, percent, seconds, table
from dsv4q.report.page.node import Gap, Node
from dsv4q.report.page.parts import blocks_of, short_name

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


def _times(report: Node) -> Times:
    """Seconds by stage of every block."""
    found = []
    for name, block in blocks_of(report):
        spent = block.get("seconds")
        found.append((name, {stage: spent.seconds(stage) for stage, _ in spent.items()}))
    if not found:
        raise Gap(f"{report.place} has no blocks")
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


def stage_totals(report: Node) -> list[Html]:
    """Seconds by stage over all blocks."""
    times = _times(report)
    stages = _stages(times)
    sums = {stage: sum(spent.get(stage, 0.0) for _, spent in times) for stage in [*stages, *BESIDE]}
    whole = sum(sums[stage] for stage in stages)
    rows: list[list[str | None]] = [
        [stage, seconds(sums[stage]), percent(sums[stage] / whole) if whole else "–", STAGES.get(stage, "")]
        for stage in stages
    ]
    rows.append(["together", seconds(whole), "100 %" if whole else "–", ""])
    rows += [
        [stage, seconds(sums[stage]), "beside", what]
        for stage, what in BESIDE.items()
        if any(stage in spent for _, spent in times)
    ]
    columns = [Column("stage", False), Column("seconds"), Column("share"), Column("what", False, wraps=True)]
    wall = report.get("seconds").seconds("this_process")
    note = (
        f"The last process of the run took {human_seconds(wall)} from start to end. Stages are measured by block; on a "
        "GPU on the GPU's own timeline, for the host runs ahead of it."
    )
    return [el("p", {"class": "soft"}, note), table("Time by stage, all blocks", columns, rows)]


def block_times(report: Node) -> list[Html]:
    """Stacked bars of every block, and how far apart the blocks came on disk."""
    times = _times(report)
    stages, done = _stages(times), on_disk_after(times)
    apart = _apart(times)
    stacks = [
        (stage, (*STAGES, stage).index(stage) % 8, [spent.get(stage, 0.0) for _, spent in times]) for stage in stages
    ]
    totals = [sum(spent.get(stage, 0.0) for stage in stages) for _, spent in times]
    top = max([*totals, *(value for value in apart if value is not None)])
    titles, rows = [], []
    for column, (name, spent) in enumerate(times):
        each = ", ".join(f"{stage} {spent[stage]:.2f}" for stage in (*stages, *BESIDE) if stage in spent)
        at = done[column]
        after = "" if at is None else f"; on disk after {at:,.1f} s"
        titles.append((float(column), column + 1.0, f"{name}: {totals[column]:.2f} s; {each}{after}"))
        values = [spent.get(stage) for stage in (*stages, *BESIDE)]
        rows.append([name, seconds(totals[column]), *map(_cell, values), _cell(at)])
    slowest = max(range(len(times)), key=lambda column: totals[column])
    title = f"{human_seconds(totals[slowest])} for the slowest block, {times[slowest][0]}"
    frame = Frame(
        title,
        f"Seconds by stage. Columns are the blocks from {times[0][0]} to {times[-1][0]}; numbers are layers.",
        f"Stacked bars of seconds by stage for {len(times)} blocks. {title}. The table below has the values.",
        names_axis([short_name(name) for name, _ in times], "block"),
        linear_axis(top, lambda value: f"{value:.3g} s", "seconds"),
    )
    known = any(value is not None for value in apart)
    marks = ("from the block before on disk to this one", apart) if known else None
    heads = [Column(head) for head in ("stages", *stages, *BESIDE, "on disk after")]
    return [bar_chart(frame, stacks, marks, titles),
            numbers("seconds by block", [Column("block", False), *heads], rows)]  # fmt: skip


def _apart(times: Times) -> list[float | None]:
    """Seconds from the block before on disk to this one, in one process."""
    found = [times[0][1].get(DONE_AT)]
    for (_, before), (_, spent) in pairwise(times):
        one, two = before.get(DONE_AT), spent.get(DONE_AT)
        # a resumed run begins its clock anew, and what passed before that is not known
        found.append(None if one is None or two is None or two < one else two - one)
    return found


def _cell(value: float | None) -> str:
    return "–" if value is None else seconds(value)


# ------------------------------------------------------------------------------------------------ memory


def memory_peaks(report: Node) -> list[Html]:
    """Peaks of the whole run."""
    peak = report.get("peak_memory")
    gpu = peak.maybe("gpu")
    text = f"Peak of the process: {human_bytes(peak.integer('host'))} of host memory"
    return [el("p", None, text + (f", {human_bytes(peak.integer('gpu'))} of GPU memory." if gpu else "."))]


def memory_over_time(report: Node) -> list[Html]:
    """Memory when each block was on disk."""
    blocks, times = blocks_of(report), _times(report)
    after = on_disk_after(times)
    samples = [
        (at, name, memory)
        for (name, block), at in zip(blocks, after, strict=True)
        if at is not None and (memory := block.maybe("memory")) is not None
    ]
    if len(samples) < 2:
        raise Gap(f"{report.place} has no samples of memory over time (blocks[].memory)")
    kinds = [kind for kind in ("host", "gpu") if any(memory.maybe(kind) is not None for _, _, memory in samples)]
    points = {
        kind: [(at, memory.integer(kind) / 1e9) for at, _, memory in samples if memory.maybe(kind) is not None]
        for kind in kinds
    }
    called = {"host": "host, resident", "gpu": "GPU, allocated"}
    lines = [Line(called[kind], points[kind], colour) for colour, kind in enumerate(kinds)]
    end = max(at for at, _, _ in samples)
    x = linear_axis(end, _time_label(end), "time since the start")
    x = Axis(0.0, end, tuple(tick for tick in x.ticks if tick[0] <= end * 0.97), title=x.title)
    most = {kind: max(y for _, y in points[kind]) for kind in kinds}
    title = "At most " + ", ".join(f"{most[kind]:.3g} GB {called[kind]}" for kind in kinds)
    frame = Frame(
        title,
        "Memory in use when each block had come on disk, in GB (1e9 bytes). Peaks between two samples do not show.",
        f"Line chart of memory over time. {title}. The table below has the values.",
        x,
        linear_axis(max(most.values()), lambda value: f"{value:.3g} GB", "GB"),
    )
    titles, before = [], 0.0
    for at, name, memory in samples:
        each = ", ".join(f"{called[kind]} {human_bytes(memory.integer(kind))}" for kind in kinds if memory.maybe(kind))
        titles.append((before, at, f"{name} after {at:,.1f} s: {each}"))
        before = at
    unit = Unit.for_bytes(max(most.values()) * 1e9)
    rows: list[list[str | None]] = [
        [name, seconds(at), *(unit.of(memory.integer(kind)) if memory.maybe(kind) else "–" for kind in kinds)]
        for at, name, memory in samples
    ]
    columns = [Column("block", False), Column("after, s"), *(Column(f"{called[kind]}, {unit.name}") for kind in kinds)]
    return [line_chart(frame, lines, titles), numbers("memory over time", columns, rows)]


def _time_label(end: float) -> Callable[[float], str]:
    if end >= 7200:
        return lambda value: f"{value / 3600:.3g} h"
    return (lambda value: f"{value / 60:.3g} min") if end >= 180 else (lambda value: f"{value:.3g} s")


# ------------------------------------------------------------------------------------------------ ranks


def ranks(found: Sequence[Node]) -> list[Html]:
    """What each of several ranks did."""
    unit = Unit.for_bytes(max(rank.integer(key) for rank in found for key in ("read_bytes", "write_bytes")))
    rows: list[list[str | None]] = []
    for rank in found:
        peak = rank.maybe("peak_memory")
        gpu = None if peak is None else peak.maybe("gpu")
        rows.append(
            [str(rank.integer("rank")), unit.of(rank.integer("read_bytes")), f"{rank.integer('micro_batches'):,}",
             f"{rank.integer('encoded_linears'):,}", unit.of(rank.integer("write_bytes")),
             "–" if peak is None else unit.of(peak.integer("host")),
             "–" if peak is None or gpu is None else unit.of(peak.integer("gpu"))]
        )  # fmt: skip
    columns = [Column("rank"), Column(f"read, {unit.name}"), Column("micro-batches"), Column("linears encoded"),
               Column(f"written, {unit.name}"), Column(f"host peak, {unit.name}"),
               Column(f"GPU peak, {unit.name}")]  # fmt: skip
    return [table(f"What each of {len(rows)} ranks did", columns, rows)]
