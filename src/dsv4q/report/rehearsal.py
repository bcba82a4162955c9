"""What a rehearsal found out, as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4q.console import Console, human_bytes, human_seconds
from dsv4q.report.build import show_report
from dsv4q.report.show import show_differences


def show_rehearsal(result: Mapping[str, Any], console: Console) -> None:
    """The result for people."""
    show_report(result["report"], console)
    counts, seconds, peak, run = result["counts"], result["seconds"], result["peak"], result["rehearsal"]
    if run["calibration"]:
        console.print(f"calibration: {run['calibration']}")
    console.print(f"time: {human_seconds(seconds['all'])}, {len(run['layers'])} of {run['of_layers']} layers")
    if run["judged"]:
        _show_verdict(result, console)
    else:
        console.print(f"{counts['shards']} shards written, not verified")
    gpu = f", {human_bytes(peak['gpu'])} GPU" if "gpu" in peak else ""
    console.print(f"peaks: {human_bytes(peak['host'])} host{gpu}, {human_bytes(peak['disk'])} disk")
    real = result["real_run"]
    speeds = ", ".join(f"{human_seconds(value)} at {speed}" for speed, value in real["seconds_at"].items())
    form = "FP8 and MXFP4" if run["native"] else "BF16"
    console.print(f"a real run also reads {human_bytes(real['source_bytes'])} of {form} from its storage: {speeds}")


def _show_verdict(result: Mapping[str, Any], console: Console) -> None:
    counts, seconds = result["counts"], result["seconds"]
    rounded = sum(stats["tensors"] for stats in counts["inexact"].values())
    console.print(
        f"judged: {counts['shards_verified']} of {counts['shards']} shards, {counts['tensors']:,} tensors, "
        f"{counts['mtp_tensors']:,} of them mtp.*, {human_bytes(counts['bytes'])}; "
        f"{sum(counts['exact'].values()):,} quantized linears equal to their source, {rounded:,} rounded; "
        f"{counts['difference_count']:,} differences"
    )
    show_differences(result["differences"], console)
    waited, after = human_seconds(seconds["waited_for_judge"]), human_seconds(seconds["judging_after"])
    console.print(
        f"judging took {human_seconds(seconds['judging'])} beside the run, which waited {waited} for it, and {after} "
        "at the end"
    )
