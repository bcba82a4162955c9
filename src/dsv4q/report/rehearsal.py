"""What a rehearsal found out: one object for machines, a short text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsv4q.console import Console, human_bytes, human_seconds
from dsv4q.plan.plan import Plan
from dsv4q.report.build import show_report
from dsv4q.report.show import SHOWN

if TYPE_CHECKING:
    from dsv4q.dropping import Dropping
    from dsv4q.rehearse import Prepared, Rehearsal

STORAGE = (1e9, 3e9, 7e9)
"""Bytes per second for which the result says how long reading a real source takes: a network disk to a fast NVMe."""


def rehearsal_result(
    rehearsal: Rehearsal,
    prepared: Prepared,
    report: dict[str, Any],
    dropping: Dropping,
    times: Mapping[str, float],
) -> dict[str, Any]:
    """What `--json` prints: the run's report, what the judge says, counts and times."""
    judge, plan = dropping.judge, prepared.plan
    differences = [difference.as_dict() for difference in judge.log.differences]
    return {
        "rehearsal": {
            "source": str(rehearsal.source),
            "layers": list(prepared.layers),
            "of_layers": prepared.whole.dims.layers,
            "kept": rehearsal.keep,
            "calibration": None if report["calibration"] is None else report["calibration"]["source"],
        },
        "counts": {
            "shards": len(plan.shards),
            "shards_verified": judge.shards,
            "tensors": judge.tensors,
            "mtp_tensors": judge.mtp_tensors,
            "bytes": judge.nbytes,
            "exact": dict(judge.case.exact),
            "inexact": {role: stats.as_dict() for role, stats in judge.case.errors.items()},
            "checks": dict(judge.log.checks),
            "difference_count": len(differences),
        },
        "differences": differences,
        "seconds": {
            **{name: round(value, 3) for name, value in times.items()},
            "judging": round(dropping.busy, 3),
            "waited_for_judge": round(dropping.waited, 3),
        },
        "peak": {**report["peak_memory"], "disk": dropping.peak},
        "planned": prepared.plan.as_dict()["needs"],
        "real_run": _real_run(prepared.whole),
        "report": report,
    }


def _real_run(whole: Plan) -> dict[str, Any]:
    """What a run on the real BF16 checkpoint reads from storage, which a rehearsal does not."""
    nbytes = sum(spec.nbytes for spec in whole.source_specs)
    return {
        "source_bytes": nbytes,
        "seconds_at": {f"{int(speed / 1e9)} GB/s": round(nbytes / speed, 1) for speed in STORAGE},
    }


def show_rehearsal(result: Mapping[str, Any], console: Console) -> None:
    """The result for people."""
    show_report(result["report"], console)
    counts, seconds, peak, run = result["counts"], result["seconds"], result["peak"], result["rehearsal"]
    if run["calibration"]:
        console.print(f"calibration: {run['calibration']}")
    rounded = sum(stats["tensors"] for stats in counts["inexact"].values())
    console.print(
        f"judged: {counts['shards_verified']} of {counts['shards']} shards, {counts['tensors']:,} tensors, "
        f"{counts['mtp_tensors']:,} of them mtp.*, {human_bytes(counts['bytes'])}; "
        f"{sum(counts['exact'].values()):,} quantized linears equal to their source, {rounded:,} rounded; "
        f"{counts['difference_count']:,} differences"
    )
    for difference in result["differences"][:SHOWN]:
        place = " in ".join(part for part in (difference["tensor"], difference["file"]) if part)
        console.print(f"DIFFERENCE {difference['check']}: {place}")
        console.print(f"  expected: {difference['expected']}")
        console.print(f"  found: {difference['found']}")
    if len(result["differences"]) > SHOWN:
        console.print(f"… and {len(result['differences']) - SHOWN:,} more; --json lists them all")
    waited, after = human_seconds(seconds["waited_for_judge"]), human_seconds(seconds["judging_after"])
    console.print(
        f"time: {human_seconds(seconds['all'])}, {len(run['layers'])} of {run['of_layers']} layers; judging took "
        f"{human_seconds(seconds['judging'])} beside the run, which waited {waited} for it, and {after} at the end"
    )
    gpu = f", {human_bytes(peak['gpu'])} GPU" if "gpu" in peak else ""
    console.print(f"peaks: {human_bytes(peak['host'])} host{gpu}, {human_bytes(peak['disk'])} disk")
    real = result["real_run"]
    speeds = ", ".join(f"{human_seconds(value)} at {speed}" for speed, value in real["seconds_at"].items())
    console.print(f"a real run also reads {human_bytes(real['source_bytes'])} of BF16 from its storage: {speeds}")
