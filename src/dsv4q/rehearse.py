"""A run at the real dimensions without the real checkpoint: weights are made up, shards are judged and dropped.

Everything between source and shards is `quantize`'s own code: plan, oneshot, calibration, encoding, writer, journal,
report. What differs: the source (`made_up/generated.py`), and what becomes of a whole shard, which is judged on a
thread of its own (`run/dropping.py`) and then deleted, so that the disk need is a few shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.files import WORK, write_atomic
from dsv4q.checkpoint.folder import load_model_config
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.output import check_output, disk_problem, place_problem
from dsv4q.checkpoint.pipes import BUDGET
from dsv4q.checkpoint.writer import ShardWriter
from dsv4q.config import Config
from dsv4q.console import Console, human_bytes
from dsv4q.errors import OutputError, ResumeError, UsageError, first_problem
from dsv4q.host import free_bytes, rank_variables, stoppable
from dsv4q.layout import Dims
from dsv4q.made_up.cut import chosen_layers, cut_config
from dsv4q.made_up.generated import GeneratedCheckpoint
from dsv4q.plan.needs import Estimate
from dsv4q.plan.plan import Plan, make_plan, with_problem
from dsv4q.plan.small_files import write_small_files
from dsv4q.report.build import build_report
from dsv4q.run.calibration import data_wanted, load_data
from dsv4q.run.run import Run, run_blocks, run_device
from dsv4q.verify.case import DEVICE_BYTES, Contract
from dsv4q.verify.judge import Judge, verify_headers
from dsv4q.verify.result import Log

if TYPE_CHECKING:
    from dsv4q.data.tokens import CalibrationData
    from dsv4q.run.dropping import Dropping

FLASH = Path(__file__).parent / "releases" / "deepseek-v4-flash"
"""Folder with the config.json of DeepSeek-V4-Flash."""


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

    @property
    def folder(self) -> Path:
        return self.source if self.source.is_dir() else self.source.parent


@dataclass(frozen=True)
class Prepared:
    """A rehearsal with its plan."""

    plan: Plan
    source: GeneratedCheckpoint
    layers: tuple[int, ...]
    """Numbers that the main layers have in the whole model."""
    whole: Plan
    """Of the whole model; `plan` itself if nothing is cut."""


def prepare(rehearsal: Rehearsal) -> Prepared:
    """Plan a rehearsal; its problems are in the plan.

    Raises:
        OutputError: OUT is not new, empty, or what an interrupted rehearsal left.
        SourceError: no usable config.json.
        UsageError: more layers than there are, or fewer than one.
    """
    _check_out(rehearsal)
    whole_config = load_model_config(rehearsal.source)
    config_file = rehearsal.folder / "config.json" if rehearsal.source.is_dir() else rehearsal.source
    dims = Dims.from_config(whole_config, config_file)
    layers = chosen_layers(dims, rehearsal.layers)
    whole_source = GeneratedCheckpoint.of(whole_config, rehearsal.source)
    whole = make_plan(whole_source, rehearsal.config)
    source, plan = whole_source, whole
    if len(layers) < dims.layers:
        source = GeneratedCheckpoint.of(cut_config(whole_config, layers), rehearsal.source)
        plan = _cut_plan(source, rehearsal.config, whole)
    plan = replace(plan, estimate=_estimate(plan, source, rehearsal.keep), free_disk=free_bytes(rehearsal.out))
    for problem in (place_problem(rehearsal.out), disk_problem(rehearsal.out, plan.estimate.disk, plan.free_disk)):
        plan = with_problem(plan, problem)
    return Prepared(plan, source, layers, whole)


def rehearse(rehearsal: Rehearsal, console: Console) -> dict[str, Any]:
    """Run the rehearsal to its end; returns its result (see `rehearsal_result`).

    OUT is as before afterwards, also after an error, unless shards are kept.

    Raises:
        Dsv4qError: a named reason, as `quantize`.
    """
    if rank_variables().count > 1:
        raise UsageError(
            "A rehearsal runs in one process", where="torchrun", hint="start it without torchrun; quantize takes ranks"
        )
    prepared = prepare(rehearsal)
    plan, out = prepared.plan, rehearsal.out
    if plan.problems:
        raise first_problem(plan.problems, "`dsv4q plan` on the same config.json lists them all")
    begin = time.time()
    device = run_device(rehearsal.device, plan)
    data = calibration(rehearsal, plan)
    console.talk(_announcement(rehearsal, prepared, data))
    prepared.source.make_pools()
    there = out.is_dir()
    from dsv4q.run.dropping import Dropping
    from dsv4q.run.ranks import Ranks

    log = Log()
    contract = Contract.of(plan.artifact_config, Dims.from_config(plan.artifact_config, out / "config.json"), log)
    judge = Judge(out, contract, log, source=prepared.source, deep=True, device=device, quick=True)
    dropping = Dropping(judge.shard, out, DEVICE_BYTES, keep=rehearsal.keep)
    make_writer = partial(ShardWriter, on_whole=dropping.submit)
    run = Run(out, plan, prepared.source, data, device, Ranks(), make_writer, begin)
    identity = run.identity() | {"rehearsal": True}
    journal = Journal.open(out, identity, resume=False)
    for warning in journal.warnings:
        console.warn(warning)
    finished = False
    try:
        with dropping:
            peaks = run_blocks(run, journal, console)
            blocks_done = time.time()
            seconds = blocks_done - begin
            report = build_report(plan, journal.done, identity, data, seconds=seconds, peaks=peaks)
            with stoppable() as check_stop:
                dropping.drain(check_stop)
            judge.finish()
        if rehearsal.keep:
            _keep(rehearsal, plan, report)
        finished = True
    finally:
        _clean(out, journal, there=there, keep=rehearsal.keep and finished)
    if rehearsal.keep:
        judge.log.differences.extend(verify_headers(out).differences)
    times = {"all": time.time() - begin, "blocks": blocks_done - begin, "judging_after": time.time() - blocks_done}
    return rehearsal_result(rehearsal, prepared, report, judge, dropping, times)


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


def _cut_plan(source: GeneratedCheckpoint, config: Config, whole: Plan) -> Plan:
    """Plan of a cut model, in shards of the size that the whole one's have."""
    one = config.model_copy(update={"output": config.output.model_copy(update={"shards": 1})})
    share = make_plan(source, one).artifact_bytes / whole.artifact_bytes
    shards = max(1, round(config.output.shards * share))
    return make_plan(source, config.model_copy(update={"output": config.output.model_copy(update={"shards": shards})}))


def _estimate(plan: Plan, source: GeneratedCheckpoint, keep: bool) -> Estimate:
    """The plan's needs, and those of the pools and of judging beside the run."""
    pools = source.pool_bytes
    return replace(
        plan.estimate,
        host=plan.estimate.host + pools + 2 * BUDGET,
        gpu=plan.estimate.gpu + pools + DEVICE_BYTES,
        gpu_ahead=plan.estimate.gpu_ahead + pools + DEVICE_BYTES,
        disk=plan.estimate.disk if keep else _disk(plan),
    )


def _disk(plan: Plan) -> int:
    """Bytes of the shards that are on disk together at most, and of the residual streams.

    While a block is made durable the next one is written already; shards between those two are open. Besides, one
    shard is judged and another waits.
    """
    number = {block: i for i, block in enumerate(plan.blocks)}
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
    lines = [f"Rehearsing {rehearsal.source} with made-up weights"]
    if plan is not whole and len(prepared.layers) < whole.dims.layers:
        numbers = ", ".join(map(str, prepared.layers))
        lines.append(f"  layers {numbers} of {whole.dims.layers}, and the MTP layers; shards of the whole run's size")
    lines.append(f"  calibration: {'none is needed' if data is None else data.source}")
    kept = "kept" if rehearsal.keep else "deleted"
    lines.append(
        f"  {len(plan.tensors):,} tensors, {human_bytes(plan.artifact_bytes)} in {len(plan.shards)} shards, each "
        f"verified and then {kept}; disk needed at once {human_bytes(plan.estimate.disk)}"
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


def _clean(out: Path, journal: Journal, *, there: bool, keep: bool) -> None:
    """Delete what the run wrote, or with `keep` only its work folder."""
    try:
        if not keep:
            for path in out.iterdir():
                if path.name != WORK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        journal.remove()
    finally:
        journal.close()
    if not there and not keep:
        out.rmdir()


def rehearsal_result(
    rehearsal: Rehearsal,
    prepared: Prepared,
    report: dict[str, Any],
    judge: Judge,
    dropping: Dropping,
    times: Mapping[str, float],
) -> dict[str, Any]:
    """What `--json` prints: the run's report, what the judge says, counts and times."""
    plan = prepared.plan
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
