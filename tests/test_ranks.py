"""Several ranks under torchrun: the same bytes as one, clear words when one dies, and a resume with another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv4q.checkpoint.native import scan_source
from dsv4q.plan.plan import make_plan, rank_shares
from dsv4q.plan.work import Share
from dsv4q.quantize import Job
from runs import CONFIGS, finished_files, toy_job

TOY = CONFIGS / "toy.yaml"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def quantize(source: Path, out: Path, ranks: int, *more: str, kill: str | None = None) -> Done:
    """`dsv4q quantize` as users start it; `kill` = "RANK:BLOCK" SIGKILLs that rank when it begins that block."""
    command = ["dsv4q", "quantize", str(source), str(out), "-c", str(TOY), "--device", "cpu", *more]
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    if kill is not None:
        start += ["dying"]
        command = command[1:]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
        "KILL": kill or "",
    }  # fmt: skip
    done = subprocess.run([*start, *command], capture_output=True, text=True, env=environment)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return toy_job(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    done = quantize(job.source, out, 1)
    assert done.code == 0, done.err
    return out


def assert_same(one: Path, other: Path) -> None:
    names = finished_files(one)
    assert names == finished_files(other)
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_write_the_bytes_of_one(ranks: int, job: Job, alone: Path, tmp_path: Path) -> None:
    done = quantize(job.source, tmp_path / "out", ranks)
    assert done.code == 0, done.err
    assert done.out.count("is complete") == 1
    assert_same(alone, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [rank["rank"] for rank in report["ranks"]] == list(range(ranks))
    assert all(rank["encoded_linears"] and rank["write_bytes"] for rank in report["ranks"])
    assert f"What each of {ranks} ranks did" in (tmp_path / "out" / "report.html").read_text()


def test_a_rank_that_dies_ends_the_job_and_another_number_of_ranks_resumes_it(
    job: Job, alone: Path, tmp_path: Path
) -> None:
    done = quantize(job.source, tmp_path / "out", 2, kill="1:layers.2")
    assert done.code != 0
    # Whichever is first: the survivor misses its peer, or torchrun asks it to stop.
    assert "error: Another rank of this job is gone" in done.err or "error: Stopped before the end" in done.err
    assert "the same command goes on" in done.err
    assert (tmp_path / "out" / ".dsv4q" / "journal.jsonl").is_file()
    again = quantize(job.source, tmp_path / "out", 1)
    assert again.code == 0 and "Resuming" in again.err
    assert_same(alone, tmp_path / "out")


@pytest.mark.parametrize("count", [1, 2, 3, 8, 300])
@pytest.mark.parametrize("things", [1, 7, 256])
def test_shares_hold_everything_once(count: int, things: int) -> None:
    shares = [Share(rank, count) for rank in range(count)]
    assert sorted(n for share in shares for n in share.among(things)) == list(range(things))
    assert [n for share in shares for n in share.experts(things)] == list(range(things))


@pytest.mark.parametrize("count", [1, 3])
def test_the_shares_of_all_ranks_add_up_to_the_artifact(count: int, job: Job) -> None:
    plan = make_plan(scan_source(job.source), job.config)
    shares = rank_shares(plan, count)
    assert sum(share["write_bytes"] for share in shares) == sum(t.nbytes for t in plan.tensors)
    assert sum(share["encoded_linears"] for share in shares) == len(plan.group_of)
    assert sum(share["micro_batches"] for share in shares) == 2
