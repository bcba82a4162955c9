"""How fast several ranks write shards together: the run's own writer on full-width blocks, without a model.

    python -m torch.distributed.run --standalone --nproc-per-node N scripts/bench_writes.py FOLDER
        [--layers 4 | --whole [--part 1/2]] [--source CONFIG_JSON] [--config configs/nvfp4-fp8-mtp.yaml]
        [--every-rank-syncs] [--advise]

Each rank puts the tensors that the plan gives to it, as `quantize` does, and lets each block become durable while it
puts the next one; nothing is computed. Without torchrun one process does all. FOLDER is emptied afterwards. Rank 0
prints one JSON object: seconds from the end of one block to the end of the next, and GB/s over all. With `--whole` it
is every block of the artifact, 181 GB, and each shard is deleted by other threads once it is whole, as `rehearse` has
it: so long a rehearsal takes at least, on that disk. Then it also says for how many seconds it was deleting, by all
threads, and how many writing had to wait for it. With `--part 1/2` it is the first half of the blocks: a disk changes
from one quarter of an hour to the next, so what is compared with it belongs between two parts.

For comparison: with `--every-rank-syncs` each rank calls fsync for each file that it wrote into, with `--advise`
write-back is begun by `posix_fadvise`. So it was until 2026-11-26.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from dsv4q.checkpoint import writer as checkpoint_writer
from dsv4q.checkpoint.writer import BackgroundWriter, ShardWriter, block_digest
from dsv4q.config import load_config
from dsv4q.console import Console, Mode
from dsv4q.plan.work import WorkTable
from dsv4q.rehearse import FLASH, Rehearsal, prepare
from dsv4q.run.dropping import Dropping
from dsv4q.run.ranks import Ranks, ranks

CONFIG = Path(__file__).parent.parent / "configs" / "nvfp4-fp8-mtp.yaml"
TOGETHER = 4
"""Linears whose tensors are put in one piece, as in run/handover.py."""


def advise(handle: int, offset: int, length: int) -> None:
    """Begin write-back by saying that the pages are not needed."""
    os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)


def measure(
    folder: Path, rehearsal: Rehearsal, here: Ranks, *, each: bool, part: tuple[int, int] | None
) -> dict[str, object]:
    """Write the layers of the plan, or a part of all of it; on rank 0 what it took."""
    plan = prepare(rehearsal).plan
    work = WorkTable(plan, here.share.count).blocks
    blocks = [block for block in plan.blocks if part or block.startswith("layers.")]
    if part:
        number, of = part
        blocks = blocks[len(blocks) * (number - 1) // of : len(blocks) * number // of]
    data = os.urandom(max(t.nbytes for t in plan.tensors))
    ends: list[float] = []
    dropping = Dropping(None, folder, 0, keep=False)
    writer = ShardWriter(folder, plan, on_whole=dropping.submit) if part else ShardWriter(folder, plan)
    writer.names_shards = here.is_leader
    if not each:
        writer.to_sync = here.files_to_sync

    def on_disk(digests: Mapping[str, str], seconds: float) -> None:
        here.gathered((block_digest(digests), seconds), behind=True)
        ends.append(time.perf_counter())

    here.wait_for_all()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with dropping, BackgroundWriter(writer) as behind:
        for block in blocks:
            mine = [w for w in work[block] if w.rank == here.share.rank]
            for start in range(0, len(mine), TOGETHER):
                tensors = [t for w in mine[start : start + TOGETHER] for t in (*w.kept, *w.encoded)]
                behind.put(block, [(t.name, memoryview(data)[: t.nbytes]) for t in tensors])
            behind.finish(block, on_disk)
    writer.close()
    nbytes = sum(t.nbytes for block in blocks for t in plan.block_tensors(block))
    each = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
    return {"ranks": here.share.count, "gigabytes": nbytes / 1e9, "seconds": [round(s, 3) for s in each],
            "gigabytes_per_second": round(nbytes / 1e9 / (ends[-1] - begin), 3),
            "deleting": round(dropping.busy, 3), "waited_for_it": round(dropping.waited, 3)}  # fmt: skip


def part_of(text: str) -> tuple[int, int]:
    """1/2 as numbers."""
    number, of = map(int, text.split("/"))
    if not 1 <= number <= of:
        raise ValueError(text)
    return number, of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    blocks = parser.add_mutually_exclusive_group()
    blocks.add_argument("--layers", type=int, default=4)
    blocks.add_argument("--whole", action="store_true", help="all of the artifact, each shard deleted once it is whole")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="the I-th of N parts of --whole")
    parser.add_argument("--source", type=Path, default=FLASH)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--every-rank-syncs", action="store_true")
    parser.add_argument("--advise", action="store_true")
    options = parser.parse_args()
    if options.advise:
        checkpoint_writer._start_writing_back = advise
    layers, part = (None, options.part) if options.whole else (options.layers, None)
    rehearsal = Rehearsal(options.folder, load_config(options.config), options.source, layers)
    with ranks("cpu", Console(Mode.QUIET)) as here:
        found = measure(options.folder, rehearsal, here, each=options.every_rank_syncs, part=part)
        here.wait_for_all()
        if here.is_leader:
            shutil.rmtree(options.folder)
            print(json.dumps({"options": sys.argv[2:], **found}), flush=True)


if __name__ == "__main__":
    main()
