"""The story of a run, read first: config -> source -> plan -> check -> blocks -> finish -> verify.

`prepare` is everything cheap and refuses what cannot work; `quantize` executes exactly the plan that `prepare`
made. Nothing outside OUT is written, and OUT/.dsv4q holds all that an unfinished run needs to go on.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q import __version__
from dsv4q.checkpoint.journal import Journal, check_output, is_finished
from dsv4q.checkpoint.native import open_source, scan_source
from dsv4q.checkpoint.output import already_there, disk_problem, finished_report, place_problem, require_verified
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.writer import BackgroundWriter, ShardWriter, check_finished_shards
from dsv4q.config import Config
from dsv4q.console import Console
from dsv4q.errors import DataError, DeviceError, Dsv4qError
from dsv4q.host import stoppable, usable_device
from dsv4q.plan.plan import (
    Plan,
    ShardPlan,
    first_problem,
    free_bytes,
    make_plan,
    rank_shares,
    require_weights,
    with_problem,
)
from dsv4q.plan.small_files import write_small_files
from dsv4q.report.build import build_report, peak_memory

if TYPE_CHECKING:
    import torch

    from dsv4q.data.tokens import CalibrationData, DataSpec
    from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP
    from dsv4q.run.ranks import Ranks

TESTED = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors")
"""Libraries whose version may change a bit of the artifact; a resume wants the same ones."""


@dataclass(frozen=True)
class Job:
    """One run as the user asked for it."""

    source: Path
    out: Path
    config: Config
    device: str = "auto"
    resume: bool = True


@dataclass(frozen=True)
class Run:
    """A run with all it works with: `quantize` makes it of a job, a rehearsal or a benchmark of parts of its own."""

    out: Path
    plan: Plan
    source: Checkpoint
    data: CalibrationData | None
    device: torch.device
    make_writer: Callable[[Path, ShardPlan], ShardWriter] = ShardWriter
    begin: float = field(default_factory=time.time)
    ranks: Ranks | None = None
    """Of several, this process; None without torchrun."""

    @property
    def is_leader(self) -> bool:
        return self.ranks is None or self.ranks.is_leader

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the artifact."""
        import torch

        return {
            "config": self.plan.config.canonical(),
            "source": self.source.fingerprint(),
            "data": None if self.data is None else {"digest": self.data.digest, "tokens": self.data.tokens},
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def prepare(job: Job) -> Plan:
    """Plan the run and collect every problem that can be known without reading a tensor.

    Raises:
        OutputError, SourceError, ConfigError: what makes planning itself impossible.
    """
    check_output(job.out, job.source)
    checkpoint = scan_source(job.source)
    require_weights(checkpoint)
    with checkpoint:
        free = free_bytes(job.out)
        plan = make_plan(checkpoint, job.config, free_disk=free)
    disk = disk_problem(job.out, plan.estimate.disk, free)
    for problem in (place_problem(job.out), disk, _data_problem(job)):
        plan = with_problem(plan, problem)
    return plan


def quantize(job: Job, console: Console) -> dict[str, Any]:
    """Run the job to its end, or continue an unfinished one. Returns the report that is also OUT/report.json.

    Raises:
        Dsv4qError: a named reason; finished blocks are kept and the same command goes on from there.
    """
    plan = _possible(job)
    from dsv4q.run.ranks import ranks

    with open_source(job.source) as source, ranks(job.device) as here:
        run = _begin(job, plan, source, ranks=here)
        identity = run.identity()
        # Every rank has looked at OUT before one of them changes it.
        here.wait_for_all()
        if here.from_leader(is_finished(job.out)):
            return already_there(job.out, identity, resume=job.resume)
        journal = _journal(job, run, identity, console)
        try:
            report = run_blocks(run, journal, identity, console)
            if run.is_leader:
                write_small_files(job.out, job.source, plan, report)
                journal.remove()
            here.wait_for_all()
        finally:
            journal.close()
    if run.is_leader:
        require_verified(job.out)
    return report


def _journal(job: Job, run: Run, identity: dict[str, Any], console: Console) -> Journal:
    """The journal, kept by rank 0; the others follow it."""
    if not run.is_leader:
        assert run.ranks is not None
        return Journal.follow(job.out, run.ranks.from_leader(None))
    journal = Journal.open(job.out, identity, resume=job.resume)
    try:
        if journal.done:
            console.talk(f"Resuming: {len(journal.done)} of {len(run.plan.blocks)} blocks are done")
            check_finished_shards(job.out, run.plan, journal.done)
        if run.ranks is not None:
            run.ranks.from_leader(journal.done)
    except BaseException:
        journal.close()
        raise
    return journal


def quantize_blocks(
    job: Job, console: Console, make_writer: Callable[[Path, ShardPlan], ShardWriter] = ShardWriter
) -> dict[str, Any]:
    """A run of the job from its start, without what makes an artifact of its shards; returns the report.

    For measurements: no index and no small files are written, nothing is verified, and the work folder is removed.

    Args:
        make_writer: makes the writer of (OUT, plan); one that keeps no bytes overrides put_all, sync, finish_blocks.

    Raises:
        Dsv4qError: as `quantize`.
    """
    plan = _possible(job)
    with open_source(job.source) as source:
        run = _begin(job, plan, source, make_writer)
        identity = run.identity()
        journal = Journal.open(job.out, identity, resume=False)
        try:
            report = run_blocks(run, journal, identity, console)
            journal.remove()
        finally:
            journal.close()
    return report


def _possible(job: Job) -> Plan:
    plan = prepare(job)
    if plan.problems:
        raise first_problem(plan.problems, "the same command with --dry-run lists them all")
    return plan


def _begin(
    job: Job,
    plan: Plan,
    source: Checkpoint,
    make_writer: Callable[[Path, ShardPlan], ShardWriter] = ShardWriter,
    ranks: Ranks | None = None,
) -> Run:
    begin = time.time()
    device = run_device(job.device if ranks is None else ranks.device_name(job.device), plan)
    data = _load_data(job, plan)
    _same_threads(job)
    return Run(job.out, plan, source, data, device, make_writer, begin, ranks)


def run_blocks(run: Run, journal: Journal, identity: dict[str, Any], console: Console) -> dict[str, Any]:
    """Every block that the journal does not know as done; returns the report."""
    _run_blocks(run, journal, console)
    shares = run.ranks.share.count if run.ranks is not None else 1
    peaks = run.ranks.gathered(peak_memory()) if run.ranks is not None else [peak_memory()]
    ranks = [share | {"peak_memory": peak} for share, peak in zip(rank_shares(run.plan, shares), peaks, strict=False)]
    return build_report(run.plan, journal.done, identity, run.data, seconds=time.time() - run.begin, ranks=ranks)


def _run_blocks(run: Run, journal: Journal, console: Console) -> None:
    """`oneshot` on a model without memory, with our pipeline; it reads, calibrates, encodes and writes."""
    plan = run.plan
    writer = run.make_writer(run.out, plan)
    writer.names_shards = run.is_leader
    if all(block in journal.done for block in plan.blocks if plan.block_tensors(block)):
        writer.finish_blocks(plan.blocks)
        return
    from dsv4q.run.block import BlockStream
    from dsv4q.run.pipeline import run_oneshot

    writer.finish_blocks(journal.done)
    total = sum(s.nbytes for s in plan.source_specs if plan.block_tensors(s.block))
    try:
        with (
            stoppable() as check_stop,
            BackgroundWriter(writer) as behind,
            console.progress("quantizing", total) as progress,
        ):
            progress.skip(sum(s.nbytes for s in plan.source_specs if s.block in journal.done))

            def advance(block: str, nbytes: int) -> None:
                if block != progress.description:
                    progress.describe(block)
                    _return_freed_memory()
                progress.advance(nbytes)

            def stream(model: DeepseekV4ForCausalLMWithMTP) -> BlockStream:
                stream = BlockStream(
                    model, plan, run.source, behind, journal, run.data, run.device, advance, check_stop
                )
                return stream if run.ranks is None else replace(stream, ranks=run.ranks)

            run_oneshot(plan, journal.folder, stream)
    finally:
        writer.close()


def _return_freed_memory() -> None:
    """Have the heap give freed memory back to the system, where it is glibc's.

    It keeps what a block freed, in pieces that the next block does not quite fit, and so grows from block to block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def data_spec(job: Job) -> tuple[DataSpec, Path] | None:
    """What to calibrate on, and the folder that a relative path in the config is relative to."""
    from dsv4q.data.tokens import DataSpec

    wanted = job.config.calibration
    if wanted is None or not job.config.needs_data:
        return None
    spec = DataSpec(
        dataset=wanted.dataset,
        split=wanted.split,
        samples=wanted.samples,
        max_length=wanted.max_length,
        micro_batch=wanted.micro_batch,
        seed=wanted.seed,
        chat_mode=wanted.chat_mode,
    )
    here = Path.cwd()
    return spec, here if (here / wanted.dataset).exists() else job.source


def _data_problem(job: Job) -> Dsv4qError | None:
    from dsv4q.data.tokens import check_data

    wanted = data_spec(job)
    if wanted is None:
        return None
    spec, base = wanted
    try:
        check_data(spec, base)
    except DataError as error:
        if not Path(spec.dataset).is_absolute() and not (base / spec.dataset).exists():
            error.where = spec.dataset
            error.hint = f"a relative path is looked for in {Path.cwd()}, then in {job.source}"
        return error
    return None


def _load_data(job: Job, plan: Plan) -> CalibrationData | None:
    from dsv4q.data.tokens import load_calibration, load_tokenizer

    wanted = data_spec(job)
    if wanted is None:
        return None
    spec, base = wanted
    return load_calibration(spec, load_tokenizer(job.source), base, vocab_size=plan.dims.vocab)


def run_device(name: str, plan: Plan) -> torch.device:
    """The device called `name`, if it has the memory that the plan wants.

    Raises:
        DeviceError: no such device, or it is too small.
    """
    device = usable_device(name)
    if device.type == "cuda":
        import torch

        if device.index is not None:
            torch.cuda.set_device(device)  # streams and events are those of the current device
        free, total = torch.cuda.mem_get_info(device)
        if total < plan.estimate.gpu:
            raise DeviceError(
                "The GPU has too little memory",
                where=f"--device {name}",
                expected=f"{plan.estimate.gpu:,} bytes",
                found=f"{total:,} bytes, {free:,} of them free",
                hint="a smaller calibration.micro_batch needs less; --device cpu needs none",
            )
    return device


def _same_threads(job: Job) -> None:
    """Work with the thread count that the run in OUT began with: another one can change the last bit of a scale."""
    import torch

    finished = finished_report(job.out)
    before = finished["identity"] if finished else Journal.identity_of(job.out) if job.resume else None
    threads = (before or {}).get("threads")
    if isinstance(threads, int):
        torch.set_num_threads(threads)


def versions() -> dict[str, str]:
    """Versions of dsv4q and of the libraries that its bytes depend on."""
    return {"dsv4q": __version__} | {name: metadata.version(name) for name in TESTED}
