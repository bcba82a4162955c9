"""The run report: report.json for machines, a short text for people.

Built from the journal, so it is complete after any number of crashes. Times and peaks differ from run to run;
nothing else in it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsv4q.console import Console, human_bytes, human_seconds
from dsv4q.errors import WeightError
from dsv4q.formats.error import Errors
from dsv4q.host import peak_memory
from dsv4q.plan.plan import Plan
from dsv4q.plan.work import RankWork
from dsv4q.report.show import exactness

if TYPE_CHECKING:
    from dsv4q.data.tokens import CalibrationData

FORMAT = 1
"""Version of report.json's structure."""


def build_report(
    plan: Plan,
    done: Mapping[str, Mapping[str, Any]],
    identity: Mapping[str, Any],
    data: CalibrationData | None,
    *,
    seconds: float,
    peaks: Sequence[Mapping[str, int]],
) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        done: journal records by block, in the order in which the blocks were finished.
        seconds: wall time of this process' part; earlier parts count only in the blocks' own times.
        peaks: peak memory of each rank of this run.
    """
    finished = {block: number for number, block in enumerate(done)}
    blocks = [{**done[block], "finished": finished[block]} for block in plan.blocks if block in done]
    return {
        "format": FORMAT,
        "artifact": plan.as_dict()["artifact"],
        "source": plan.as_dict()["source"],
        "warnings": [warning.as_dict() for warning in (*plan.warnings, *_lost(blocks))],
        "calibration": None if data is None else _calibration(plan, data),
        "activations": plan.config.activations.model_dump(mode="json"),
        "errors": _errors(blocks),
        "coverage": _coverage(blocks),
        "blocks": blocks,
        "seconds": {"this_process": round(seconds, 3), "blocks": round(sum(_block_seconds(b) for b in blocks), 3)},
        "peak_memory": peak_memory(),
        "ranks": _ranks(blocks, peaks),
        "identity": dict(identity),
    }


def _calibration(plan: Plan, data: CalibrationData) -> dict[str, Any]:
    settings = plan.config.calibration
    assert settings is not None
    return {**settings.model_dump(mode="json"), "tokens": data.tokens, "conversations": data.conversations_used,
            "digest": data.digest, "source": data.source}  # fmt: skip


def _ranks(blocks: Sequence[Mapping[str, Any]], peaks: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    """What each rank read, computed and wrote for the finished blocks, in whichever run that was; its peak memory.

    A rank's micro-batches are the same in every block. What a resume computed once more is not counted.
    """
    count = max([len(peaks), *(len(block["ranks"]) for block in blocks)])
    found = [RankWork(rank) for rank in range(count)]
    for part in (part for block in blocks for part in block["ranks"]):
        total = found[part["rank"]]
        total.read_bytes += part["read_bytes"]
        total.encoded_linears += part["encoded_linears"]
        total.write_bytes += part["write_bytes"]
        total.micro_batches = max(total.micro_batches, part["micro_batches"])
    known = dict(enumerate(peaks))
    return [one.as_dict() | {"peak_memory": dict(known.get(one.rank, {}))} for one in found]


def _lost(blocks: Sequence[Mapping[str, Any]]) -> list[WeightError]:
    """Weights that their own scales erase."""
    return [
        WeightError(
            "Most of a weight is stored as zero",
            where=name,
            expected="a source without a value that is far beyond the others under its scale",
            found=f"{share:.1%} of it became zero",
            hint="see the source's shard: compare its SHA-256 with the publisher's",
        )
        for block in blocks
        for name, share in block.get("lost", {}).items()
    ]


def _block_seconds(block: Mapping[str, Any]) -> float:
    return sum(seconds for stage, seconds in block["seconds"].items() if stage != "done_at")


def _errors(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of each class of tensors over all blocks."""
    totals: dict[str, Errors] = {}
    for block in blocks:
        for role, found in block.get("errors", {}).items():
            totals.setdefault(role, Errors()).merge(Errors.from_dict(found))
    return {role: total.as_dict() for role, total in totals.items()}


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


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """The same for people, on a terminal."""
    console.table(
        "Blocks",
        ["block", "seconds", "read", "forward", "encode", "sync", "least tokens an expert got"],
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
    for role, e in report["errors"].items():
        console.print(f"{role}s: {exactness(e)}")
    _show_inputs(report, console)
    for warning in report["warnings"]:
        console.warn(f"{warning['what']}: {warning['where']}: {warning['found']}")
    artifact, peak = report["artifact"], report["peak_memory"]
    console.print(
        f"{artifact['tensors']:,} tensors, {artifact['mtp_tensors']} of them mtp.*, "
        f"in {len(artifact['shards'])} shards, "
        f"{human_bytes(artifact['bytes'])}; {human_seconds(report['seconds']['this_process'])}, "
        f"peak memory {human_bytes(peak['host'])} host" + (f", {human_bytes(peak['gpu'])} GPU" if "gpu" in peak else "")
    )


def _show_inputs(report: Mapping[str, Any], console: Console) -> None:
    """Where the input scales came from, and how far the largest used amax lies below the largest possible one."""
    ratios: dict[str, list[float]] = {}
    drafted = False
    for block in report["blocks"]:
        for projection, amax in block.get("input_amax", {}).items():
            if block["block"].startswith("mtp."):
                drafted = True
            else:
                ratios.setdefault(projection, []).append(amax["bound"] / amax["used"])
    if drafted:
        console.print("input scales of the draft: analytic bounds, no token goes through it")
    if not ratios:
        return
    if report["activations"]["scales"] == "bound":
        console.print("input scales: analytic bounds, no data")
        return
    far = ", ".join(f"{projection} {min(r):.3g} to {max(r):.3g} times" for projection, r in sorted(ratios.items()))
    console.print(f"input scales: observed; the analytic bound is larger by: {far}")


def _block_row(block: Mapping[str, Any]) -> list[str]:
    seconds = block["seconds"]
    tokens = block.get("tokens_per_expert")
    stages = [f"{seconds.get(stage, 0):.2f}" for stage in ("read", "forward", "encode", "sync")]
    return [block["block"], f"{_block_seconds(block):.2f}", *stages, f"{min(tokens):,}" if tokens else "-"]
