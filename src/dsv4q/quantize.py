"""The story of a run, read first: config -> source -> plan -> check -> blocks -> finish -> verify.

`prepare` is everything cheap and refuses what cannot work; `quantize` executes exactly the plan that `prepare`
made. Nothing outside OUT is written, and OUT/.dsv4q holds all that an unfinished run needs to go on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.against_layout import check_routing
from dsv4q.checkpoint.files import is_finished
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.native import scan_source
from dsv4q.checkpoint.output import already_there, check_output, disk_problem, finished_report, place_problem
from dsv4q.checkpoint.source import Checkpoint, require_weights
from dsv4q.checkpoint.writer import check_finished_shards
from dsv4q.config import Config
from dsv4q.console import Console
from dsv4q.errors import first_problem
from dsv4q.host import free_bytes
from dsv4q.plan.needs import gpu_problem
from dsv4q.plan.plan import Plan, make_plan, with_problem
from dsv4q.plan.small_files import write_small_files
from dsv4q.report.build import build_report
from dsv4q.run.calibration import data_problem, load_data, tokenizer_finding
from dsv4q.run.run import Run, run_blocks, run_device, same_threads
from dsv4q.verify.judge import require_verified

if TYPE_CHECKING:
    from dsv4q.run.ranks import Ranks


@dataclass(frozen=True)
class Job:
    """One run as the user asked for it."""

    source: Path
    out: Path
    config: Config
    device: str = "auto"
    gpu_memory: int | None = None
    """Bytes of a GPU that may be used."""
    resume: bool = True


def prepare(job: Job) -> Plan:
    """Plan the run and collect every problem that can be known without reading a tensor.

    Raises:
        OutputError, SourceError, ConfigError: what makes planning itself impossible.
    """
    check_output(job.out, job.source)
    with scan_source(job.source) as source:
        return _plan(job, source)


def _plan(job: Job, source: Checkpoint) -> Plan:
    require_weights(source)
    free = free_bytes(job.out)
    plan = make_plan(source, job.config, free_disk=free)
    disk = disk_problem(job.out, plan.estimate.disk, free)
    data, gpu = data_problem(job.config, job.source), gpu_problem(plan.estimate, job.gpu_memory)
    routing = check_routing(source, plan.dims) if source.holes.everywhere is None else []
    for problem in (*routing, place_problem(job.out), disk, data, source.holes.everywhere, gpu):
        plan = with_problem(plan, problem)
    return with_problem(plan, tokenizer_finding(job.config, job.source), stops=job.config.needs_data)


def quantize(job: Job, console: Console) -> dict[str, Any]:
    """Run the job to its end, or continue an unfinished one. Returns the report that is also OUT/report.json.

    Raises:
        Dsv4qError: a named reason; finished blocks are kept and the same command goes on from there.
    """
    check_output(job.out, job.source)
    with scan_source(job.source) as source:
        plan = _plan(job, source)
        if plan.problems:
            raise first_problem(plan.problems, "the same command with --dry-run lists them all")
        for warning in plan.warnings:
            console.warn(warning)
        from dsv4q.run.ranks import ranks

        with ranks(job.device, console) as here:
            report = _quantize(job, plan, source, here, console)
    if here.is_leader:
        require_verified(job.out)
    return report


def _quantize(job: Job, plan: Plan, source: Checkpoint, ranks: Ranks, console: Console) -> dict[str, Any]:
    """The part that every rank plays."""
    run = begin(job, plan, source, ranks)
    identity = run.identity()
    # Every rank has looked at OUT before one of them changes it.
    ranks.wait_for_all()
    if ranks.from_leader(is_finished(job.out)):
        return already_there(job.out, identity, resume=job.resume)
    journal = _journal(job, run, identity, console)
    try:
        peaks = run_blocks(run, journal, console)
        seconds = time.time() - run.begin
        report = build_report(plan, journal.done, identity, run.data, seconds=seconds, peaks=peaks)
        if ranks.is_leader:
            write_small_files(job.out, job.source, plan, report)
            journal.remove()
        ranks.wait_for_all()
    finally:
        journal.close()
    return report


def begin(job: Job, plan: Plan, source: Checkpoint, ranks: Ranks) -> Run:
    """All that the run works with; what takes seconds begins here."""
    now = time.time()
    device, gpu = run_device(ranks.device_name(job.device), plan, job.gpu_memory, ranks.share.count)
    data = load_data(job.config, job.source, plan.dims.vocab)
    finished = finished_report(job.out)
    same_threads(finished["identity"] if finished else Journal.identity_of(job.out) if job.resume else None)
    return Run(job.out, plan, source, data, device, gpu, ranks, begin=now)


def _journal(job: Job, run: Run, identity: dict[str, Any], console: Console) -> Journal:
    """The journal, kept by rank 0; the others follow it."""
    if not run.ranks.is_leader:
        return Journal.follow(job.out, run.ranks.from_leader(None))
    journal = Journal.open(job.out, identity, resume=job.resume)
    for warning in journal.warnings:
        console.warn(warning)
    try:
        if journal.done:
            console.talk(f"Resuming: {len(journal.done)} of {len(run.plan.blocks)} blocks are done")
            check_finished_shards(job.out, run.plan, journal.done)
        run.ranks.from_leader(journal.done)
    except BaseException:
        journal.close()
        raise
    return journal
