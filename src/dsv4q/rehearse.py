"""A run at the real dimensions without the real checkpoint: weights are made up, shards are judged and dropped.

Everything between source and shards is `quantize`'s own code: plan, oneshot, calibration, encoding, writer, journal,
report, ranks. What differs: the source (`made_up/generated.py`, `made_up/packed.py`), and what becomes of a whole
shard, which rank 0 judges on a thread of its own (`run/dropping.py`) and then deletes, so that the disk need is a few
shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.files import WORK, write_atomic
from dsv4q.checkpoint.folder import load_model_config
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.native import as_source
from dsv4q.checkpoint.output import check_output, disk_problem, place_problem
from dsv4q.checkpoint.pipes import BUDGET
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.writer import ShardWriter
from dsv4q.config import Config
from dsv4q.console import Console, human_bytes
from dsv4q.errors import OutputError, ResumeError, first_problem
from dsv4q.host import free_bytes, stoppable
from dsv4q.layout import Dims
from dsv4q.made_up.cut import chosen_layers, cut_config
from dsv4q.made_up.generated import GeneratedCheckpoint
from dsv4q.made_up.packed import PackedCheckpoint
from dsv4q.plan.needs import Estimate, gpu_problem
from dsv4q.plan.plan import Plan, make_plan, with_problem
from dsv4q.plan.small_files import write_small_files
from dsv4q.plan.work import WorkTable
from dsv4q.report.build import build_report
from dsv4q.run.calibration import data_wanted, load_data
from dsv4q.run.dropping import Dropping
from dsv4q.run.run import Run, run_blocks, run_device
from dsv4q.verify.case import DEVICE_BYTES, Contract
from dsv4q.verify.judge import Judge, verify_headers
from dsv4q.verify.result import Log

if TYPE_CHECKING:
    import torch

    from dsv4q.data.tokens import CalibrationData
    from dsv4q.run.dropping import Dropping
    from dsv4q.run.ranks import Ranks

FLASH = Path(__file__).parent / "releases" / "deepseek-v4-flash"
"""Folder with the config.json of DeepSeek-V4-Flash."""


Weights = GeneratedCheckpoint | PackedCheckpoint

STORAGE = (1e9, 3e9, 7e9)
"""Bytes per second for which the result says how long reading a real source takes: a network disk to a fast NVMe."""


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsal as the user asked for it."""

    out: Path
    config: Config
    source: Path = FLASH
    """A config.json, or a folder with one and perhaps a tokenizer; weights there are not read."""
    layers: int | None = None
    """So many main layers instead of all."""
    keep: bool = False
    """Leave a complete artifact instead of deleting each shard after it was judged."""
    device: str = "auto"
    gpu_memory: int | None = None
    """Bytes of a GPU that may be used."""
    native: bool = False
    """The made-up weights lie in DeepSeek's own layout instead of BF16."""
    judged: bool = True
    """Verify each shard."""

    @property
    def folder(self) -> Path:
        return self.source if self.source.is_dir() else self.source.parent


@dataclass(frozen=True)
class Prepared:
    """A rehearsal with its plan."""

    plan: Plan
    weights: Weights
    layers: tuple[int, ...]
    """Numbers that the main layers have in the whole model."""
    whole: Plan
    """Of the whole model; `plan` itself if nothing is cut."""

    @cached_property
    def source(self) -> Checkpoint:
        return as_source(self.weights)


def prepare(rehearsal: Rehearsal) -> Prepared:
    """Plan a rehearsal; its problems are in the plan.

    Raises:
        OutputError: OUT is not new, empty, or what an interrupted rehearsal left.
        SourceError: no usable config.json.
        UsageError: more layers than there are, or fewer than one; weights that have no native form.
    """
    _check_out(rehearsal)
    whole_config = load_model_config(rehearsal.source)
    config_file = rehearsal.folder / "config.json" if rehearsal.source.is_dir() else rehearsal.source
    dims = Dims.from_config(whole_config, config_file)
    layers = chosen_layers(dims, rehearsal.layers)
    weights = _weights(rehearsal, whole_config)
    whole = plan = make_plan(as_source(weights), rehearsal.config)
    if len(layers) < dims.layers:
        weights = _weights(rehearsal, cut_config(whole_config, layers))
        plan = _cut_plan(as_source(weights), rehearsal.config, whole)
    plan = replace(plan, estimate=_estimate(plan, weights, rehearsal), free_disk=free_bytes(rehearsal.out))
    disk = disk_problem(rehearsal.out, plan.estimate.disk, plan.free_disk)
    for problem in (place_problem(rehearsal.out), disk, gpu_problem(plan.estimate, rehearsal.gpu_memory)):
        plan = with_problem(plan, problem)
    return Prepared(plan, weights, layers, whole)


def rehearse(rehearsal: Rehearsal, console: Console) -> dict[str, Any] | None:
    """Run the rehearsal to its end; returns its result (see `rehearsal_result`), on the first of several ranks.

    OUT is as before afterwards, also after an error, unless shards are kept. Where one of several ranks fails, the
    others may still write: then OUT's work folder stays, and the next rehearsal replaces what it finds beside it.

    Raises:
        Dsv4qError: a named reason, as `quantize`.
    """
    prepared = prepare(rehearsal)
    if prepared.plan.problems:
        raise first_problem(prepared.plan.problems, "`dsv4q plan` on the same config.json lists them all")
    from dsv4q.run.ranks import ranks

    with ranks(rehearsal.device, console) as here:
        return _rehearse(rehearsal, prepared, here, console)


def _rehearse(rehearsal: Rehearsal, prepared: Prepared, ranks: Ranks, console: Console) -> dict[str, Any] | None:
    """The part that every rank plays."""
    plan, out = prepared.plan, rehearsal.out
    begin = time.time()
    device, gpu = run_device(ranks.device_name(rehearsal.device), plan, rehearsal.gpu_memory, ranks.share.count)
    data = calibration(rehearsal, plan)
    console.talk(_announcement(rehearsal, prepared, data))
    there = out.is_dir()
    run = Run(out, plan, prepared.source, data, device, gpu, ranks, begin=begin)
    # Every rank has looked at OUT before one of them changes it.
    ranks.wait_for_all()
    if not ranks.is_leader:
        run_blocks(run, Journal.follow(out, ranks.from_leader(None)), console)
        return None
    judge = _judge(rehearsal, prepared, device)
    dropping = Dropping(None if judge is None else judge.shard, out, DEVICE_BYTES, keep=rehearsal.keep)
    run = replace(run, make_writer=partial(ShardWriter, on_whole=dropping.submit))
    identity = run.identity() | {"rehearsal": True}
    journal = Journal.open(out, identity, resume=False)
    for warning in journal.warnings:
        console.warn(warning)
    finished = False
    try:
        ranks.from_leader(journal.done)
        with dropping:
            peaks = run_blocks(run, journal, console)
            blocks_done = time.time()
            report = build_report(plan, journal.done, identity, data, seconds=blocks_done - begin, peaks=peaks)
            with stoppable() as check_stop:
                dropping.drain(check_stop)
            if judge is not None:
                judge.finish()
        if rehearsal.keep:
            _keep(rehearsal, plan, report)
        finished = True
    finally:
        _clean(out, journal, there=there, keep=rehearsal.keep and finished, ended=finished or ranks.is_alone)
    if rehearsal.keep and judge is not None:
        judge.log.differences.extend(verify_headers(out).differences)
    times = {"all": time.time() - begin, "blocks": blocks_done - begin, "judging_after": time.time() - blocks_done}
    return rehearsal_result(rehearsal, prepared, report, judge, dropping, times)


def _judge(rehearsal: Rehearsal, prepared: Prepared, device: torch.device) -> Judge | None:
    if not rehearsal.judged:
        return None
    config, log = prepared.plan.artifact_config, Log()
    contract = Contract.of(config, Dims.from_config(config, rehearsal.out / "config.json"), log)
    return Judge(rehearsal.out, contract, log, source=prepared.source, deep=True, device=device, quick=True)


# ------------------------------------------------------------------------------------------------ before


def _check_out(rehearsal: Rehearsal) -> None:
    """OUT is new, empty, or has the remains of a rehearsal; never an artifact or an unfinished run of quantize."""
    out = rehearsal.out
    check_output(out, rehearsal.folder)
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        before = Journal.identity_of(out)
    except ResumeError:
        before = {}
    ours = (out / WORK).is_dir() and (
        bool(before.get("rehearsal")) if before is not None else not any(out.glob("model-*"))
    )
    if not ours:
        raise OutputError(
            "The output folder is not empty and not an interrupted rehearsal",
            where=out,
            expected="a new or empty folder",
            found=", ".join(sorted(p.name for p in out.iterdir())[:5]),
            hint="choose another folder; nothing in this one was touched",
        )


def _weights(rehearsal: Rehearsal, config: dict[str, Any]) -> Weights:
    plain = GeneratedCheckpoint.of(config, rehearsal.source)
    return PackedCheckpoint.of(plain) if rehearsal.native else plain


def _cut_plan(source: Checkpoint, config: Config, whole: Plan) -> Plan:
    """Plan of a cut model, in shards of the size that the whole one's have."""
    one = config.model_copy(update={"output": config.output.model_copy(update={"shards": 1})})
    share = make_plan(source, one).artifact_bytes / whole.artifact_bytes
    shards = max(1, round(config.output.shards * share))
    return make_plan(source, config.model_copy(update={"output": config.output.model_copy(update={"shards": shards})}))


def _estimate(plan: Plan, weights: Weights, rehearsal: Rehearsal) -> Estimate:
    """The plan's needs, and those of the pools and of judging beside the run."""
    # The judge has BF16 values copied out of pools on the device itself.
    pools = weights.pool_bytes
    judging = (DEVICE_BYTES + pools * isinstance(weights, GeneratedCheckpoint)) * rehearsal.judged
    return replace(
        plan.estimate,
        host=plan.estimate.host + pools + 2 * BUDGET * rehearsal.judged,
        gpu=tuple(replace(use, nbytes=use.nbytes + judging) for use in plan.estimate.gpu),
        disk=plan.estimate.disk if rehearsal.keep else _disk(plan),
    )


def _disk(plan: Plan) -> int:
    """Bytes of the shards that are on disk together at most, and of the residual streams.

    Blocks that are copied are written together with the first. While a block is made durable the next one is written
    already; shards between those two are open. Besides, one shard is judged and another waits.
    """
    first = {"embed", *WorkTable(plan).copied}
    number = dict.fromkeys(first, 0)
    number |= {block: i for i, block in enumerate((b for b in plan.blocks if b not in first), 1)}
    spans = [({number[t.block] for t in shard.tensors}, shard.nbytes) for shard in plan.shards]
    together = max(
        sum(nbytes for blocks, nbytes in spans if min(blocks) <= i + 1 and max(blocks) >= i)
        for i in range(len(plan.blocks))
    )
    streams = plan.estimate.disk - sum(shard.nbytes for shard in plan.shards)
    return min(together + 2 * max(nbytes for _, nbytes in spans), plan.estimate.disk - streams) + streams


def calibration(rehearsal: Rehearsal, plan: Plan) -> CalibrationData | None:
    """The config's data if dataset and tokenizer are on this machine, else random token ids of the same number.

    Raises:
        DataError: local data that cannot be used.
    """
    from dsv4q.made_up.tokens import random_tokens

    wanted = data_wanted(rehearsal.config, rehearsal.folder)
    if wanted is None:
        return None
    spec, base = wanted
    if not (base / spec.dataset).exists():  # a hub id would go to the network
        return random_tokens(spec, plan.dims.vocab, f"{spec.dataset} is not a local file or folder")
    if not (rehearsal.folder / "tokenizer.json").is_file():
        return random_tokens(spec, plan.dims.vocab, f"{rehearsal.folder} has no tokenizer.json")
    return load_data(rehearsal.config, rehearsal.folder, plan.dims.vocab)


def _announcement(rehearsal: Rehearsal, prepared: Prepared, data: CalibrationData | None) -> str:
    plan, whole = prepared.plan, prepared.whole
    form = "in DeepSeek's own layout" if rehearsal.native else "in BF16"
    lines = [f"Rehearsing {rehearsal.source} with made-up weights {form}"]
    if plan is not whole and len(prepared.layers) < whole.dims.layers:
        numbers = ", ".join(map(str, prepared.layers))
        lines.append(f"  layers {numbers} of {whole.dims.layers}, and the draft; shards of the whole run's size")
    lines.append(f"  calibration: {'none is needed' if data is None else data.source}")
    kept = "kept" if rehearsal.keep else "deleted"
    fate = f"verified and then {kept}" if rehearsal.judged else f"{kept} unverified"
    lines.append(
        f"  {len(plan.tensors):,} tensors, {human_bytes(plan.artifact_bytes)} in {len(plan.shards)} shards, each "
        f"{fate}; disk needed at once {human_bytes(plan.estimate.disk)}"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ after


def _keep(rehearsal: Rehearsal, plan: Plan, report: Mapping[str, Any]) -> None:
    """Make a complete artifact of the shards; its model card says that the weights are made up."""
    out = rehearsal.out
    write_small_files(out, rehearsal.folder, plan, dict(report))
    card = (out / "README.md").read_text(encoding="utf-8")
    note = "\n## Made-up weights\n\nWritten by `dsv4q rehearse`: the model's form is real, its weights are not.\n"
    write_atomic(out / "README.md", card + note)


def _clean(out: Path, journal: Journal, *, there: bool, keep: bool, ended: bool) -> None:
    """Delete what the run wrote, or with `keep` only its work folder.

    Unless the work of all ranks has `ended` the work folder stays, by which the next rehearsal knows what they leave.
    """
    try:
        if not keep:
            for path in out.iterdir():
                if path.name != WORK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if ended:
            journal.remove()
    finally:
        journal.close()
    if ended and not there and not keep:
        out.rmdir()


def rehearsal_result(
    rehearsal: Rehearsal,
    prepared: Prepared,
    report: dict[str, Any],
    judge: Judge | None,
    dropping: Dropping,
    times: Mapping[str, float],
) -> dict[str, Any]:
    """What `--json` prints: the run's report, what the judge says, counts and times."""
    return {
        "rehearsal": {
            "source": str(rehearsal.source),
            "native": rehearsal.native,
            "layers": list(prepared.layers),
            "of_layers": prepared.whole.dims.layers,
            "kept": rehearsal.keep,
            "judged": rehearsal.judged,
            "calibration": None if report["calibration"] is None else report["calibration"]["source"],
        },
        "counts": {"shards": len(prepared.plan.shards), **(_judged(judge) if judge is not None else {})},
        "differences": [] if judge is None else [difference.as_dict() for difference in judge.log.differences],
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


def _judged(judge: Judge) -> dict[str, Any]:
    return {
        "shards_verified": judge.shards,
        "tensors": judge.tensors,
        "mtp_tensors": judge.mtp_tensors,
        "bytes": judge.nbytes,
        "exact": dict(judge.case.exact),
        "inexact": {role: stats.as_dict() for role, stats in judge.case.errors.items()},
        "checks": dict(judge.log.checks),
        "difference_count": len(judge.log.differences),
    }


def _real_run(whole: Plan) -> dict[str, Any]:
    """What a run on the real checkpoint reads from storage, which a rehearsal does not."""
    nbytes = sum(nbytes for _, nbytes in whole.source_files.entries.values())
    return {
        "source_bytes": nbytes,
        "seconds_at": {f"{int(speed / 1e9)} GB/s": round(nbytes / speed, 1) for speed in STORAGE},
    }
