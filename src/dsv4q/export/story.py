"""The story, read first: artifact and source -> do they belong together -> plan -> check -> blocks -> finish -> verify.

Bytes are copied on threads, ahead and behind, block by block with a line in the journal, as in `quantize`. Files of
the source that stay whole are compared and taken over beside them. Memory: the parcels under way (`pipes.BUDGET`,
`writer.STEADY_BEHIND`). No GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from typing import Any

from dsv4q import __version__
from dsv4q.checkpoint.files import is_finished
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.native import scan_source
from dsv4q.checkpoint.output import already_there, check_output, disk_problem, place_problem
from dsv4q.checkpoint.pipes import Behind, loaded_ahead
from dsv4q.checkpoint.shards import PlannedShard, ShardPlan
from dsv4q.checkpoint.source import Checkpoint, require_weights
from dsv4q.checkpoint.writer import STEADY_BEHIND, BackgroundWriter, ShardWriter, block_digest, check_finished_shards
from dsv4q.console import Console
from dsv4q.errors import SourceError
from dsv4q.export.compressed import ToCompressed
from dsv4q.export.job import Direction, Export, open_artifact, parcels_of
from dsv4q.export.links import needs_no_room, take_over
from dsv4q.export.modelopt import ToModelOpt
from dsv4q.export.plan import check_layout
from dsv4q.foreign.modelopt import COMPRESSED, MODELOPT, layout_of
from dsv4q.host import free_bytes, stoppable
from dsv4q.verify.judge import require_verified

FORMAT = 1
"""Version of this report.json's structure."""

_FILES_AT_ONCE = 4
"""Files of the source that are compared and taken over while blocks are written."""

_LAYOUTS = {MODELOPT: COMPRESSED, COMPRESSED: MODELOPT}
"""Layout of OUT -> that of the artifact."""


def export(job: Export, console: Console) -> dict[str, Any]:
    """Run the job to its end, or continue an unfinished one. Returns the report that is also OUT/report.json.

    Raises:
        Dsv4qError: a named reason; finished blocks are kept and the same command goes on from there.
    """
    begin = time.time()
    check_layout(job.layout)
    for folder in (job.artifact, job.source):
        check_output(job.out, folder)
    artifact, made_by = open_artifact(job.artifact)
    with artifact, scan_source(job.source) as source:
        _check_layout(job, artifact)
        identity = _identity(job, artifact, source)
        if is_finished(job.out):
            report = already_there(job.out, identity, resume=job.resume)
            require_verified(job.out)
            return report
        require_weights(source)
        direction: Direction
        if job.layout == MODELOPT:
            direction = ToModelOpt(job, artifact, source, made_by)
        else:
            direction = ToCompressed(job, artifact, source, made_by)
        _check_room(job, direction)
        journal = Journal.open(job.out, identity, resume=job.resume)
        try:
            with Behind(_FILES_AT_ONCE, len(direction.whole)) as files:
                taken = _take_over(job, direction, files)
                _run_blocks(job, direction, journal, console, files.raise_error)
            if taken:
                counts = Counter(future.result() for future in taken)
                told = ", ".join(f"{count} by {how}" for how, count in counts.items())
                console.talk(f"files of {source.root} taken over as they are: {told}")
            report = {
                "format": FORMAT,
                "command": "export",
                "layout": job.layout,
                "made_from": {"artifact": str(job.artifact), "source": str(job.source)},
                "artifact": direction.summary(),
                "seconds": round(time.time() - begin, 3),
                "blocks": list(journal.done.values()),
                **direction.facts(),
                "identity": identity,
            }
            direction.write_small_files(report)
            journal.remove()
        finally:
            journal.close()
    require_verified(job.out)
    return report


def _check_layout(job: Export, artifact: Checkpoint) -> None:
    wanted, found = _LAYOUTS[job.layout], layout_of(artifact.config)
    if found == wanted:
        return
    what = f"The artifact is not in {wanted} layout, so it cannot be exported to {job.layout}"
    hint = "give a folder that `dsv4q quantize` or `dsv4q export` made"
    if found == job.layout:
        what, hint = f"The artifact is in {job.layout} layout already", f"leave it as it is, or take --layout {wanted}"
    where = f"{artifact.config_file}: quantization_config"
    raise SourceError(what, where=where, expected=wanted, found=found or "neither layout", hint=hint)


def _identity(job: Export, artifact: Checkpoint, source: Checkpoint) -> dict[str, Any]:
    """Everything that decides the bytes."""
    return {
        "command": "export",
        "config": None if job.config is None else job.config.canonical(),
        "input": artifact.fingerprint(),
        "layout": job.layout,
        "source": source.fingerprint(),
        "versions": {"dsv4q": __version__},
    }


def _check_room(job: Export, direction: Direction) -> None:
    needed = sum(shard.nbytes for shard in direction.plan.shards if shard.file not in direction.whole)
    needed += sum(path.stat().st_size for path in direction.whole.values() if not needs_no_room(path, job.out))
    for problem in (place_problem(job.out), disk_problem(job.out, needed, free_bytes(job.out))):
        if problem is not None:
            raise problem


def _take_over(job: Export, direction: Direction, files: Behind) -> list[Future[str]]:
    """Files of the source that are shards as they are, beside the blocks; of each how it was taken over."""

    def one(shard: PlannedShard) -> str:
        direction.check_whole(shard.tensors)
        files.check()
        return take_over(direction.whole[shard.file], job.out, shard.file)

    whole = (shard for shard in direction.plan.shards if shard.file in direction.whole)
    return [files.put(partial(one, shard)) for shard in whole if not (job.out / shard.file).is_file()]


def _run_blocks(
    job: Export, direction: Direction, journal: Journal, console: Console, check_files: Callable[[], None]
) -> None:
    plan = ShardPlan(tuple(shard for shard in direction.plan.shards if shard.file not in direction.whole))
    if journal.done:
        console.talk(f"Resuming: {len(journal.done)} of {len(plan.blocks)} blocks are done")
        check_finished_shards(job.out, plan, journal.done)
    todo = [parcel for b in plan.blocks if b not in journal.done for parcel in parcels_of(plan.block_tensors(b))]
    writer = ShardWriter(job.out, plan)
    writer.finish_blocks(journal.done)
    try:
        with (
            stoppable() as check_stop,
            BackgroundWriter(writer, budget=STEADY_BEHIND) as behind,
            loaded_ahead(todo, direction.make, lambda parcel: parcel.nbytes) as ready,
            console.progress("exporting", plan.artifact_bytes) as progress,
        ):
            progress.skip(plan.artifact_bytes - sum(parcel.nbytes for parcel in todo))
            for block, members in groupby(ready, key=lambda pair: pair[0].block):
                progress.describe(block)
                divisors: dict[str, float] = {}
                for parcel, made in members:
                    check_stop()
                    check_files()
                    divisors |= made.divisors
                    behind.put(block, made.data)
                    progress.advance(parcel.nbytes)
                behind.finish(block, _line(direction, journal, block, divisors))
    finally:
        writer.close()


def _line(
    direction: Direction, journal: Journal, block: str, divisors: Mapping[str, float]
) -> Callable[[Mapping[str, str], float], None]:
    """Tells the journal, once the block is on disk."""

    def on_disk(digests: Mapping[str, str], seconds: float) -> None:
        digest = block_digest(digests)
        direction.check_block(block, digest)
        journal.finish_block(block, {"digest": digest, **({"divisors": dict(divisors)} if divisors else {})})

    return on_disk
