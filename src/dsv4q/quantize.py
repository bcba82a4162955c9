"""The story of a run, read first: config -> source -> plan -> check -> blocks -> finish -> verify.

`prepare` is everything cheap and refuses what cannot work; `quantize` executes exactly the plan that `prepare`
made. Nothing outside OUT is written, and OUT/.dsv4q holds all that an unfinished run needs to go on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q import __version__
from dsv4q.checkpoint.finish import write_small_files
from dsv4q.checkpoint.journal import REPORT, Journal, check_output, first_difference, is_finished
from dsv4q.checkpoint.plan import Plan, free_bytes, make_plan, require_weights, with_problem
from dsv4q.checkpoint.source import Checkpoint, open_checkpoint, scan
from dsv4q.checkpoint.verify import verify_headers
from dsv4q.checkpoint.writer import ShardWriter, check_finished_shards
from dsv4q.config import Config
from dsv4q.console import Console
from dsv4q.errors import DeviceError, DiskError, Dsv4qError, OutputError, VerificationFailed
from dsv4q.report import build_report

if TYPE_CHECKING:
    import torch

    from dsv4q.calibration.data import CalibrationData, DataSpec

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


def prepare(job: Job) -> Plan:
    """Plan the run and collect every problem that can be known without reading a tensor.

    Raises:
        OutputError, SourceError, ConfigError: what makes planning itself impossible.
    """
    check_output(job.out, job.source)
    checkpoint = scan(job.source)
    require_weights(checkpoint)
    with checkpoint:
        free = free_bytes(job.out)
        plan = make_plan(checkpoint, job.config, free_disk=free)
    plan = with_problem(plan, _disk_problem(plan, job.out))
    return with_problem(plan, _data_problem(job))


def quantize(job: Job, console: Console) -> dict[str, Any]:
    """Run the job to its end, or continue an unfinished one. Returns the report that is also OUT/report.json.

    Raises:
        Dsv4qError: a named reason; finished blocks are kept and the same command goes on from there.
    """
    plan = prepare(job)
    if plan.problems:
        raise _first(plan.problems)
    begin = time.time()
    with open_checkpoint(job.source) as source:
        device = _device(job.device, plan)
        data = _load_data(job, plan)
        _same_threads(job)
        identity = _identity(job, source, data, device)
        if is_finished(job.out):
            return _already_there(job, identity)
        journal = Journal.open(job.out, identity, resume=job.resume)
        try:
            if journal.done:
                console.talk(f"Resuming: {len(journal.done)} of {len(plan.blocks)} blocks are done")
                check_finished_shards(job.out, plan, journal.done)
            _run_blocks(job, plan, source, journal, data, device, console)
            report = build_report(plan, journal.done, identity, data, seconds=time.time() - begin)
            write_small_files(job.out, job.source, plan, report)
            journal.remove()
        finally:
            journal.close()
    _verify(job.out)
    return report


def _run_blocks(
    job: Job,
    plan: Plan,
    source: Checkpoint,
    journal: Journal,
    data: CalibrationData | None,
    device: torch.device,
    console: Console,
) -> None:
    """`oneshot` on a model without memory, with our pipeline; it reads, calibrates, encodes and writes."""
    if all(block in journal.done for block in plan.blocks if plan.block_tensors(block)):
        ShardWriter(job.out, plan).finish_blocks(plan.blocks)
        return
    from dsv4q.calibration.oneshot import run_oneshot
    from dsv4q.calibration.stream import BlockStream

    writer = ShardWriter(job.out, plan)
    total = sum(s.nbytes for s in plan.source_specs if plan.block_tensors(s.block))
    try:
        with console.progress("quantizing", total) as progress:
            progress.skip(sum(s.nbytes for s in plan.source_specs if s.block in journal.done))

            def advance(block: str, nbytes: int) -> None:
                progress.describe(block)
                progress.advance(nbytes)

            run_oneshot(
                plan,
                journal.folder,
                lambda model: BlockStream(model, plan, source, writer, journal, data, device, advance),
            )
    finally:
        writer.close()


def _first(problems: tuple[Dsv4qError, ...]) -> Dsv4qError:
    error = problems[0]
    if len(problems) > 1:
        more = f"{len(problems) - 1} more problem(s); `dsv4q plan` lists them all"
        error.hint = f"{error.hint}; {more}" if error.hint else more
        error.args = (error.text(),)
    return error


def _disk_problem(plan: Plan, out: Path) -> DiskError | None:
    written = sum(f.stat().st_blocks * 512 for f in out.rglob("*") if f.is_file()) if out.is_dir() else 0
    free = plan.free_disk
    if free is None or free + written >= plan.estimate.disk:
        return None
    return DiskError(
        "There is too little free disk for the artifact",
        where=out,
        expected=f"{plan.estimate.disk:,} bytes",
        found=f"{free:,} bytes",
        hint="make room or choose an output folder on another disk",
    )


def data_spec(job: Job) -> tuple[DataSpec, Path] | None:
    """What to calibrate on, and the folder that a relative path in the config is relative to."""
    from dsv4q.calibration.data import DataSpec

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
    from dsv4q.calibration.data import check_data

    wanted = data_spec(job)
    if wanted is None:
        return None
    try:
        check_data(*wanted)
    except Dsv4qError as error:
        return error
    return None


def _load_data(job: Job, plan: Plan) -> CalibrationData | None:
    from dsv4q.calibration.data import load_calibration, load_tokenizer

    wanted = data_spec(job)
    if wanted is None:
        return None
    spec, base = wanted
    return load_calibration(spec, load_tokenizer(job.source), base, vocab_size=plan.dims.vocab)


def _device(name: str, plan: Plan) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            "There is no such device",
            where=f"--device {name}",
            expected="auto, cpu, cuda or cuda:N",
            found=str(error).splitlines()[0],
        ) from error
    if device.type == "meta":
        raise DeviceError("The meta device has no memory to work in", where=f"--device {name}")
    if device.type == "cuda":
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
    """Continue with the thread count that the run began with: another one can change the last bit of a scale."""
    import torch

    before = Journal.identity_of(job.out) if job.resume else None
    if before is not None:
        torch.set_num_threads(int(before["threads"]))


def versions() -> dict[str, str]:
    """Versions of dsv4q and of the libraries that its bytes depend on."""
    return {"dsv4q": __version__} | {name: metadata.version(name) for name in TESTED}


def _identity(job: Job, source: Checkpoint, data: CalibrationData | None, device: torch.device) -> dict[str, Any]:
    """Everything that decides the bytes of the artifact."""
    import torch

    return {
        "config": job.config.canonical(),
        "source": source.fingerprint(),
        "data": None if data is None else {"digest": data.digest, "tokens": data.tokens},
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _already_there(job: Job, identity: dict[str, Any]) -> dict[str, Any]:
    """A finished artifact is returned as it is if this very job made it, and refused otherwise."""
    report: dict[str, Any] = json.loads((job.out / REPORT).read_text(encoding="utf-8"))
    difference = first_difference(report.get("identity"), identity)
    if difference or not job.resume:
        key, before, now = difference or ("", "finished", "asked to start over")
        raise OutputError(
            "The output folder holds a finished artifact",
            where=f"{job.out}: {key}" if key else job.out,
            expected=before,
            found=now,
            hint="choose another folder, or delete this artifact yourself",
        )
    # The index is the last file of all, so a crash after it can only have left the work folder behind.
    Journal.remove_leftovers(job.out)
    return report


def _verify(out: Path) -> None:
    """The independent judge looks at the headers before we say that it is done."""
    result = verify_headers(out)
    if not result.ok:
        first = result.differences[0]
        raise VerificationFailed(
            f"The finished artifact has {len(result.differences)} difference(s) from the contract",
            where=f"{first.tensor or ''} {first.file or ''}".strip() or out,
            expected=first.expected,
            found=first.found,
            hint=f"dsv4q verify-shards {out} lists all; please report this",
        )
