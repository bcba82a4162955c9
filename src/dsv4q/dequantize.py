"""A native release as the BF16 checkpoint that it stands for: source -> plan -> check -> blocks -> finish -> verify.

Tensors are read and decoded ahead (`checkpoint/values.py`) and written behind, block by block with a line in the
journal, as in `quantize`. Memory: the tensors under way (`pipes.BUDGET`, `writer.STEADY_BEHIND`), or the largest one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dsv4q import __version__
from dsv4q.checkpoint.against_layout import check_routing, compare_with_layout
from dsv4q.checkpoint.files import is_finished
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.native import NativeCheckpoint, forms_of, scan_source
from dsv4q.checkpoint.output import already_there, check_output, disk_problem, place_problem
from dsv4q.checkpoint.pin import pin_of
from dsv4q.checkpoint.shards import PlannedShard, PlannedTensor, ShardPlan, balanced_shards, shard_name
from dsv4q.checkpoint.source import Checkpoint, require_weights
from dsv4q.checkpoint.values import Batch, batches, values_ahead
from dsv4q.checkpoint.writer import STEADY_BEHIND, BackgroundWriter, ShardWriter, block_digest, check_finished_shards
from dsv4q.console import Console
from dsv4q.errors import Dsv4qError, SourceError, WeightError, command, first_problem
from dsv4q.formats.dtypes import tensor_bytes
from dsv4q.host import free_bytes, gpu_memory_errors, stoppable, usable_device
from dsv4q.layout import Dims, source_tensors
from dsv4q.plan.model_config import carried_config
from dsv4q.plan.small_files import write_plain_files
from dsv4q.verify.judge import require_verified

_LOOK = 4096


@dataclass(frozen=True)
class Dequantization:
    """One run as the user asked for it."""

    source: Path
    out: Path
    shards: int | None = None
    """None: the files of the source."""
    resume: bool = True
    device: str = "auto"


def dequantize(job: Dequantization, console: Console) -> dict[str, Any]:
    """Run the job to its end, or continue an unfinished one. Returns the report that is also OUT/report.json.

    Raises:
        Dsv4qError: a named reason; finished blocks are kept and the same command goes on from there.
    """
    begin = time.time()
    device = usable_device(job.device)
    check_output(job.out, job.source)
    with scan_source(job.source) as source:
        plan = _plan(job, source)
        config, odd_keys = carried_config(source.config, source.config_file)
        for warning in (*source.warnings, *source.holes.warnings, *odd_keys):
            console.warn(warning)
        identity = _identity(job, source)
        if is_finished(job.out):
            report = already_there(job.out, identity, resume=job.resume)
            require_verified(job.out)
            return report
        journal = Journal.open(job.out, identity, resume=job.resume)
        for lack in journal.warnings:
            console.warn(lack)
        try:
            _run_blocks(job, plan, source, device, journal, console)
            report = {
                "command": "dequantize",
                "source": str(job.source),
                "pin": pin_of(source).as_dict(),
                "forms": forms_of(source),
                "tensors": len(plan.tensors),
                "bytes": plan.artifact_bytes,
                "shards": [shard.file for shard in plan.shards],
                "seconds": round(time.time() - begin, 3),
                "blocks": list(journal.done.values()),
                "identity": identity,
            }
            write_plain_files(job.out, job.source, plan, config, report)
            journal.remove()
        finally:
            journal.close()
    require_verified(job.out)
    return report


def _run_blocks(
    job: Dequantization,
    plan: ShardPlan,
    source: Checkpoint,
    device: torch.device,
    journal: Journal,
    console: Console,
) -> None:
    if journal.done:
        console.talk(f"Resuming: {len(journal.done)} of {len(plan.blocks)} blocks are done")
        check_finished_shards(job.out, plan, journal.done)
    names = {block: [t.name for t in plan.block_tensors(block)] for block in plan.blocks if block not in journal.done}
    todo = {block: batches(source, some, device) for block, some in names.items()}
    wanted = [batch for some in todo.values() for batch in some]
    writer = ShardWriter(job.out, plan)
    writer.finish_blocks(journal.done)
    again = "free the GPU of other work, or use --device cpu; the same command goes on from here"
    try:
        with (
            gpu_memory_errors(f"--device {device}", hint=again),
            stoppable() as check_stop,
            BackgroundWriter(writer, budget=STEADY_BEHIND) as behind,
            values_ahead(source, wanted, device) as ready,
            console.progress("dequantizing", plan.artifact_bytes) as progress,
        ):
            progress.skip(plan.artifact_bytes - sum(batch.nbytes for batch in wanted))
            for block, some in todo.items():
                progress.describe(block)
                for batch, values in islice(ready, len(some)):
                    check_stop()
                    _check_values(source, batch, values)
                    data, size = tensor_bytes(values), batch.nbytes // len(batch.names)
                    behind.put(block, [(n, data[i * size : (i + 1) * size]) for i, n in enumerate(batch.names)])
                    progress.advance(batch.nbytes)
                behind.finish(block, _line(journal, block))
    finally:
        writer.close()


def _check_values(source: Checkpoint, batch: Batch, values: torch.Tensor) -> None:
    """Refuse weights and norms that are nothing but zeros, among the values [T, ...] of a batch.

    Raises:
        WeightError: the first of them.
    """
    for name, value in zip(batch.names, values.flatten(1), strict=True):
        # Of what is not zeros the first elements tell.
        if name.endswith(".weight") and not bool(value[:_LOOK].any()) and not bool(value.any()):
            raise WeightError(
                "A source tensor is nothing but zeros",
                where=f"{source.root / source.tensors[name].file}: {name}",
                hint="a stopped download leaves zeros: get this shard again, or check its SHA-256",
            )


def _line(journal: Journal, block: str) -> Callable[[Mapping[str, str], float], None]:
    """Tells the journal, once the block is on disk."""
    return lambda digests, seconds: journal.finish_block(block, {"digest": block_digest(digests)})


def _plan(job: Dequantization, source: Checkpoint) -> ShardPlan:
    """Every tensor of the model as BF16, F32 or I64, in the files of the source or in balanced shards.

    Raises:
        SourceError: damaged, not of the layout, or not quantized.
        ConfigError: more shards than there are pieces.
        OutputError, DiskError: the place cannot be written or is too small.
    """
    require_weights(source)
    dims = Dims.from_config(source.config, source.config_file)
    problems: list[Dsv4qError] = [*source.problems, *compare_with_layout(source, dims), *source.holes.problems]
    problems += check_routing(source, dims)
    if not problems and not isinstance(source, NativeCheckpoint):
        nothing = "There is nothing to dequantize: none of the weights is FP8 or MXFP4"
        problems.append(SourceError(nothing, where=job.source, hint="`dsv4q quantize` takes this checkpoint as it is"))
    if problems:
        raise first_problem(tuple(problems), f"`{command('dsv4q', 'plan', job.source)}` lists them all")
    tensors = [PlannedTensor(s.name, s.dtype, s.shape, s, False, s.block) for s in source_tensors(dims)]
    plan = ShardPlan(balanced_shards(tensors, job.shards, "--shards") if job.shards else _same_files(source, tensors))
    room = disk_problem(job.out, sum(shard.nbytes for shard in plan.shards), free_bytes(job.out))
    for problem in (source.holes.everywhere, place_problem(job.out), room):
        if problem is not None:
            raise problem
    return plan


def _same_files(source: Checkpoint, tensors: list[PlannedTensor]) -> tuple[PlannedShard, ...]:
    """Each tensor in the file of the source that has its weight.

    A file that held nothing but scales is left out. The names stay if they then are those of a complete series.
    """
    members: dict[str, list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        members[source.tensors[tensor.name].file].append(tensor)
    series = {file: shard_name(number, len(members)) for number, file in enumerate(sorted(members), 1)}
    return tuple(PlannedShard.of(series[file], members[file]) for file in sorted(members))


def _identity(job: Dequantization, source: Checkpoint) -> dict[str, Any]:
    """Everything that decides the bytes."""
    return {
        "command": "dequantize",
        "source": source.fingerprint(),
        "shards": job.shards,
        "versions": {"dsv4q": __version__},
    }
