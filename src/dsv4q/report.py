"""The run report: report.json for machines, a short text for people.

Built from the journal, so it is complete after any number of crashes. Times and peaks differ from run to run;
nothing else in it does.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.plan import Plan
from dsv4q.console import Console, human_bytes, human_seconds

if TYPE_CHECKING:
    from dsv4q.calibration.data import CalibrationData

FORMAT = 1
"""Version of report.json's structure."""


def build_report(
    plan: Plan,
    done: Mapping[str, Mapping[str, Any]],
    identity: Mapping[str, Any],
    data: CalibrationData | None,
    *,
    seconds: float,
) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        done: journal records by block.
        seconds: wall time of this process' part; earlier parts count only in the blocks' own times.
    """
    blocks = [dict(done[block]) for block in plan.blocks if block in done]
    return {
        "format": FORMAT,
        "artifact": plan.as_dict()["artifact"],
        "source": plan.as_dict()["source"],
        "calibration": None if data is None else _calibration(plan, data),
        "activations": plan.config.activations.model_dump(mode="json"),
        "errors": _errors(blocks),
        "coverage": _coverage(blocks),
        "blocks": blocks,
        "seconds": {"this_process": round(seconds, 3), "blocks": round(sum(_block_seconds(b) for b in blocks), 3)},
        "peak_memory": peak_memory(),
        "identity": dict(identity),
    }


def _calibration(plan: Plan, data: CalibrationData) -> dict[str, Any]:
    settings = plan.config.calibration
    assert settings is not None
    return {**settings.model_dump(mode="json"), "tokens": data.tokens, "conversations": data.conversations_used,
            "digest": data.digest, "source": data.source}  # fmt: skip


def _block_seconds(block: Mapping[str, Any]) -> float:
    return sum(block["seconds"].values())


def _errors(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of each class of tensors over all blocks."""
    totals: dict[str, dict[str, Any]] = {}
    for block in blocks:
        for role, found in block.get("errors", {}).items():
            total = totals.setdefault(
                role,
                {
                    "tensors": 0,
                    "exact": 0,
                    "squared_error": 0.0,
                    "squared_weight": 0.0,
                    "worst": 0.0,
                    "worst_tensor": "",
                },
            )
            for key in ("tensors", "exact", "squared_error", "squared_weight"):
                total[key] += found[key]
            if found["worst"] >= total["worst"]:
                total["worst"], total["worst_tensor"] = found["worst"], found["worst_tensor"]
    for total in totals.values():
        power = total["squared_weight"]
        total["relative_error"] = (total["squared_error"] / power) ** 0.5 if power else 0.0
    return totals


def _coverage(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Which routed experts the router reached, by block; hash-routed layers too."""
    found = {b["block"]: b for b in blocks if "tokens_per_expert" in b}
    return {
        block: {
            "least": min(record["tokens_per_expert"]),
            "most": max(record["tokens_per_expert"]),
            "unreached": sum(n == 0 for n in record["tokens_per_expert"]),
            "fallback": record["experts_without_tokens"],
        }
        for block, record in found.items()
    }


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process: resident host memory, and GPU memory if torch used one."""
    peak = {"host": _peak_resident()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu"] = int(torch.cuda.max_memory_allocated())
    return peak


def _peak_resident() -> int:
    # Linux hands getrusage's number on through exec, so a child of a large process would report its parent's peak
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """The same for people, on a terminal."""
    console.table(
        "Blocks",
        ["block", "seconds", "read", "forward", "encode", "write", "least tokens an expert got"],
        [_block_row(block) for block in report["blocks"]],
    )
    console.table(
        "Weights",
        ["class", "tensors", "exact", "relative error", "worst", "worst tensor"],
        [
            [role, f"{e['tensors']:,}", f"{e['exact']:,}", f"{e['relative_error']:.2%}", f"{e['worst']:.2%}",
             e["worst_tensor"]]
            for role, e in report["errors"].items()
        ],
    )  # fmt: skip
    artifact, peak = report["artifact"], report["peak_memory"]
    console.print(
        f"{artifact['tensors']:,} tensors, {artifact['mtp_tensors']} of them mtp.*, "
        f"in {len(artifact['shards'])} shards, "
        f"{human_bytes(artifact['bytes'])}; {human_seconds(report['seconds']['this_process'])}, "
        f"peak memory {human_bytes(peak['host'])} host" + (f", {human_bytes(peak['gpu'])} GPU" if "gpu" in peak else "")
    )


def _block_row(block: Mapping[str, Any]) -> list[str]:
    seconds = block["seconds"]
    tokens = block.get("tokens_per_expert")
    stages = [f"{seconds.get(stage, 0):.2f}" for stage in ("read", "forward", "encode", "write")]
    return [block["block"], f"{_block_seconds(block):.2f}", *stages, f"{min(tokens):,}" if tokens else "-"]
