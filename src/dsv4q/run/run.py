"""One run with all it works with, on this machine: every block that the journal does not know as done.

`quantize` makes a `Run` of a job; a rehearsal or a benchmark makes one of parts of its own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q import __version__
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.shards import ShardPlan
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.writer import BackgroundWriter, ShardWriter
from dsv4q.console import Console, Progress
from dsv4q.host import gpu_memory_errors, peak_memory, prompt_threads, stoppable, usable_device
from dsv4q.plan.needs import CUDA_BYTES, GpuUse, too_small
from dsv4q.plan.plan import Plan
from dsv4q.plan.work import WorkTable

if TYPE_CHECKING:
    import torch

    from dsv4q.data.tokens import CalibrationData
    from dsv4q.run.ranks import Ranks

TESTED = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors")
"""Libraries whose version may change a bit of the artifact; a resume wants the same ones."""


@dataclass(frozen=True)
class Run:
    """What `run_blocks` works with."""

    out: Path
    plan: Plan
    source: Checkpoint
    data: CalibrationData | None
    device: torch.device
    gpu: GpuUse | None
    """How the GPU's memory is used, if the device is one."""
    ranks: Ranks
    """Of one or several, this process."""
    make_writer: Callable[[Path, ShardPlan], ShardWriter] = ShardWriter
    begin: float = field(default_factory=time.time)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the artifact. Of data that are its tokens, not where they lay."""
        import torch

        config = self.plan.config.canonical()
        if config["calibration"] is not None:
            config["calibration"] = {k: v for k, v in config["calibration"].items() if k not in ("dataset", "split")}
        return {
            "config": config,
            "source": self.source.fingerprint(),
            "data": None if self.data is None else {"digest": self.data.digest, "tokens": self.data.tokens},
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def run_blocks(run: Run, journal: Journal, console: Console) -> list[dict[str, int]]:
    """Have every block done; returns the peak memory of each rank, on the first of them.

    Raises:
        Dsv4qError: a named reason; finished blocks are kept.
    """
    writer = run.make_writer(run.out, run.plan)
    writer.names_shards = run.ranks.is_leader
    writer.to_sync = run.ranks.files_to_sync
    if all(block in journal.done for block in run.plan.blocks if run.plan.block_tensors(block)):
        writer.finish_blocks(run.plan.blocks)
    else:
        writer.finish_blocks(journal.done)
        try:
            _run_blocks(run, journal, writer, console)
        finally:
            writer.close()
    return run.ranks.gathered(peak_memory())


def _run_blocks(run: Run, journal: Journal, writer: ShardWriter, console: Console) -> None:
    """`oneshot` on a model without memory, with our pipeline; it reads, calibrates, encodes and writes."""
    from dsv4q.run.copying import Copying
    from dsv4q.run.schedule import Schedule

    less = (
        "free the GPU of other work, say with --gpu-memory how much of it to use, or lower calibration.micro_batch "
        "and use --no-resume; finished blocks are kept"
    )
    room = f"about {run.gpu.nbytes if run.gpu else 0:,} bytes free"
    work = WorkTable(run.plan, run.ranks.share.count)
    todo = {block: part for block, part in work.blocks.items() if run.plan.block_tensors(block)}
    nbytes = {block: sum(w.spec.nbytes for w in part) for block, part in todo.items()}
    with (
        stoppable(still_beginning=True) as check_stop,
        BackgroundWriter(writer) as behind,
        console.progress("quantizing", sum(nbytes.values())) as progress,
        gpu_memory_errors(f"--device {run.device}", expected=room, hint=less),
        prompt_threads(),
    ):
        progress.skip(sum(nbytes.get(block, 0) for block in journal.done))
        advance = _advance(progress)
        schedule = Schedule(
            run.plan, work, run.source, journal, run.data, run.device, run.gpu, run.ranks,
            behind.put, advance, check_stop,
        )  # fmt: skip
        with Copying(schedule.copied, run.source, behind.put, advance) as copying, schedule.begun() as blocks:
            # Seconds of imports, in which disk and GPU have something to do already.
            from dsv4q.run.pipeline import BlockLoop, run_oneshot

            run_oneshot(
                run.plan, journal.folder, run.device, lambda model: BlockLoop(model, schedule, blocks, copying, behind)
            )


def _advance(progress: Progress) -> Callable[[str, int], None]:
    def advance(block: str, nbytes: int) -> None:
        if block != progress.description:
            progress.describe(block)
            _return_freed_memory()
        progress.advance(nbytes)

    return advance


def _return_freed_memory() -> None:
    """Have the heap give freed memory back to the system, where it is glibc's.

    It keeps what a block freed, in pieces that the next block does not quite fit, and so grows from block to block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def run_device(
    name: str, plan: Plan, gpu_memory: int | None = None, ranks: int = 1
) -> tuple[torch.device, GpuUse | None]:
    """The device called `name`, and how its memory will be used if it is a GPU, by one of so many ranks.

    Args:
        gpu_memory: bytes of it that may be used; torch then refuses to allocate more.

    Raises:
        DeviceError: no such device; it is too small.
    """
    device = usable_device(name)
    if device.type != "cuda":
        return device, None
    import torch

    if device.index is not None:
        torch.cuda.set_device(device)  # streams and events are those of the current device
    free, total = torch.cuda.mem_get_info(device)
    allowed = total if gpu_memory is None else min(total, gpu_memory)
    if gpu_memory is not None:
        index = torch.cuda.current_device()
        torch.cuda.set_per_process_memory_fraction(max(0, allowed - CUDA_BYTES) / total, index)
    needs = plan.estimate
    use = needs.on_gpu(min(allowed - CUDA_BYTES, free), ranks) or needs.on_gpu(allowed - CUDA_BYTES, ranks)
    if use is None:
        where = f"--device {name}" + ("" if gpu_memory is None else f" --gpu-memory {gpu_memory}")
        raise too_small(needs, where, f"{total:,} bytes, {free:,} of them free")
    return device, use


def same_threads(before: Mapping[str, Any] | None) -> None:
    """Work with the thread count of the run whose identity this is: another one can change the last bit of a scale."""
    import torch

    threads = (before or {}).get("threads")
    # Told a number, even its own, torch tells it each new thread, which of a forked process cannot take it.
    if isinstance(threads, int) and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def versions() -> dict[str, str]:
    """Versions of dsv4q and of the libraries that its bytes depend on."""
    return {"dsv4q": __version__} | {name: metadata.version(name) for name in TESTED}
