"""Several ranks under torchrun: the same bytes as one, clear words when one dies, and a resume with another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from dsv4q.checkpoint.native import scan_source
from dsv4q.config import load_config
from dsv4q.plan.plan import make_plan
from dsv4q.plan.work import Share, WorkTable
from dsv4q.quantize import Job
from runs import CONFIGS, at_toy_size, finished_files, run, toy_job

TOY = CONFIGS / "toy.yaml"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def quantize(
    source: Path, out: Path, ranks: int, config: Path = TOY, *, kill: str | None = None, hang: str = ""
) -> Done:
    """`dsv4q quantize` as users start it; see `started`."""
    return started(ranks, "quantize", source, out, "-c", config, kill=kill, hang=hang)


def rehearse(source: Path, out: Path, ranks: int, *flags: str, kill: str | None = None) -> Done:
    """`dsv4q rehearse` as users start it; see `started`."""
    return started(ranks, "rehearse", out, "-c", TOY, "--source", source, *flags, kill=kill)


def started(ranks: int, *arguments: object, kill: str | None, hang: str = "") -> Done:
    """A command under torchrun; `kill` = "RANK:BLOCK" SIGKILLs that rank when it begins that block.

    The rank that `hang` names waits there for ever, in a call that no signal interrupts.
    """
    command = ["dsv4q", *map(str, arguments), "--device", "cpu"]
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    if kill is not None:
        start += ["dying"]
        command = command[1:]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
        "KILL": kill or "", "HANG": hang,
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


def work_done(out: Path) -> list[dict[str, int]]:
    """What the report says that each rank did."""
    ranks = json.loads((out / "report.json").read_text())["ranks"]
    return [{key: value for key, value in rank.items() if key != "peak_memory"} for rank in ranks]


def planned(job: Job, ranks: int) -> list[dict[str, int]]:
    """What the plan says that each rank does."""
    return WorkTable(make_plan(scan_source(job.source), job.config), ranks).by_rank()


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_write_the_bytes_of_one(ranks: int, job: Job, alone: Path, tmp_path: Path) -> None:
    done = quantize(job.source, tmp_path / "out", ranks)
    assert done.code == 0, done.err
    assert done.out.count("is complete") == 1
    assert_same(alone, tmp_path / "out")
    assert work_done(tmp_path / "out") == planned(job, ranks)
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
    whole, shared = planned(job, 1)[0], work_done(tmp_path / "out")
    assert [rank["rank"] for rank in shared] == [0, 1]
    assert all(sum(rank[key] for rank in shared) == whole[key] for key in ("encoded_linears", "write_bytes"))


def test_a_rank_that_cannot_be_reached_says_so_and_ends_when_another_is_gone(job: Job, tmp_path: Path) -> None:
    done = quantize(job.source, tmp_path / "out", 2, kill="1:layers.2", hang="0:layers.2")
    assert done.code != 0
    assert "error: This rank was told to end and does not come out of its wait" in done.err
    assert "where: rank 0" in done.err and "the same command goes on" in done.err
    assert quantize(job.source, tmp_path / "out", 1).code == 0


def test_a_rehearsal_of_several_ranks_writes_the_shards_of_one(job: Job, tmp_path: Path) -> None:
    outs = {ranks: tmp_path / f"out{ranks}" for ranks in (1, 2)}
    for ranks, out in outs.items():
        done = rehearse(job.source, out, ranks, "--native", "--keep", "--json")
        assert done.code == 0, done.err
        result = json.loads(done.out)
        assert (result["differences"], result["counts"]["shards_verified"]) == ([], 4)
        assert len(result["report"]["ranks"]) == ranks
    shards = sorted(path.name for path in outs[1].glob("*.safetensors"))
    assert [n for n in shards if (outs[1] / n).read_bytes() != (outs[2] / n).read_bytes()] == []


def test_a_rehearsal_of_several_ranks_leaves_nothing(job: Job, tmp_path: Path) -> None:
    done = rehearse(job.source, tmp_path / "out", 2)
    assert (done.code, done.out.count("0 differences")) == (0, 1), done.err
    assert not (tmp_path / "out").exists()


def test_a_rank_that_dies_ends_the_rehearsal_and_the_next_one_replaces_it(job: Job, tmp_path: Path) -> None:
    done = rehearse(job.source, tmp_path / "out", 2, kill="1:layers.2")
    assert done.code != 0
    assert "error: Another rank of this job is gone" in done.err or "error: Stopped before the end" in done.err
    again = rehearse(job.source, tmp_path / "out", 1, "--layers", "1")
    assert again.code == 0, again.err
    assert not list((tmp_path / "out").iterdir())


def test_ranks_do_what_the_plan_said_where_experts_are_no_stacks(job: Job, tmp_path: Path) -> None:
    config = at_toy_size(load_config(CONFIGS / "w4a16-fp8-mtp.yaml"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = quantize(job.source, tmp_path / "out", 3, tmp_path / "config.yaml")
    assert done.code == 0, done.err
    assert work_done(tmp_path / "out") == planned(replace(job, config=config), 3)


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.yaml")])
def test_one_rank_does_what_the_plan_said(name: str, job: Job, tmp_path: Path) -> None:
    there = replace(toy_job(job.source.parent, name, make=False), out=tmp_path / "out")
    run(there)
    assert work_done(there.out) == planned(there, 1)


THREADS = """
from pathlib import Path
from dsv4q.console import Console
from dsv4q.run.ranks import ranks
with ranks("cpu", Console()) as here:
    import llmcompressor
    here.wait_for_all()
    rank = here.share.rank
left = [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]
Path(f"left.{rank}").write_text(repr(left))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells the names of threads")
def test_no_thread_of_a_group_outlives_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(THREADS)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [*start, tmp_path / "script.py"]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"left.{rank}").read_text() for rank in (0, 1)] == ["[]", "[]"]


SYNCS = """
import json, os
from pathlib import Path
from dsv4q.console import Console, Mode
from dsv4q.run.ranks import ranks
with ranks("cpu", Console(Mode.QUIET)) as here:
    mine = [["a", "b", "c"], ["b", "c", "d"], []][here.share.rank]
    found = [here.files_to_sync(mine)]
    os.environ["GROUP_RANK"] = str(min(here.share.rank, 1))
    found.append(here.files_to_sync(mine))
    Path(f"said.{here.share.rank}").write_text(json.dumps([mine, found]))
"""


def test_of_each_machine_one_rank_that_wrote_a_file_syncs_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SYNCS)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*start, tmp_path / "script.py"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads((tmp_path / f"said.{rank}").read_text()) for rank in range(3)]
    assert all(set(found[0]) <= set(mine) for mine, found in said)
    assert sorted(file for _, found in said for file in found[0]) == ["a", "b", "c", "d"]
    assert [found[1] for _, found in said] == [["a", "b", "c"], ["b", "c", "d"], []]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 300])
@pytest.mark.parametrize("things", [1, 7, 256])
def test_shares_hold_everything_once(count: int, things: int) -> None:
    shares = [Share(rank, count) for rank in range(count)]
    assert sorted(n for share in shares for n in share.among(things)) == list(range(things))
    assert [n for share in shares for n in share.experts(things)] == list(range(things))


@pytest.mark.parametrize("count", [1, 3])
def test_the_shares_of_all_ranks_add_up_to_the_artifact(count: int, job: Job) -> None:
    plan = make_plan(scan_source(job.source), job.config)
    shares = WorkTable(plan, count).by_rank()
    assert sum(share["write_bytes"] for share in shares) == sum(t.nbytes for t in plan.tensors)
    assert sum(share["encoded_linears"] for share in shares) == len(plan.group_of)
    assert sum(share["micro_batches"] for share in shares) == 2
