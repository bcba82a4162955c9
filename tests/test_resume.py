"""A run may die at any moment: the same command goes on, and the bytes are those of a run that never died."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from dsv4q.checkpoint.journal import Journal
from dsv4q.config import load_config
from dsv4q.errors import Dsv4qError, OutputError, ResumeError
from dsv4q.quantize import Job
from dsv4q.run import pipeline, residuals  # noqa: F401 - imported before any fork, so that no child pays for it
from killing import changes_of
from killing import killed as killed_run
from runs import CONFIGS, finished_files, run, toy_job

pytestmark = pytest.mark.usefixtures("saved_after_every_block")

KILLED_AFTER = 150
"""Changes of the disk after which a run has finished some blocks and lacks others."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_job(tmp_path_factory.mktemp("resume")).source


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Digests of an uninterrupted run's files, and how often one changes the disk at least.

    The first of a process makes folders for caches.
    """
    made = toy_job(source.parent, make=False)
    jobs = [replace(made, out=tmp_path_factory.mktemp("whole") / "out") for _ in range(2)]
    counts = [changes_of(partial(run, job)) for job in jobs]
    return digests(jobs[0].out), min(counts)


@pytest.fixture(scope="module")
def whole(uninterrupted: tuple[dict[str, str], int]) -> dict[str, str]:
    return uninterrupted[0]


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in finished_files(out)}


def run_and_kill(job: Job, after: int) -> bool:
    return killed_run(lambda: run(job), after)


@pytest.mark.parametrize(
    "part", [0, 0.003, 0.01, 0.03, 0.07, 0.13, 0.19, 0.29, 0.37, 0.43, 0.53, 0.61, 0.71, 0.83, 0.91]
)
def test_a_run_killed_after_this_part_of_its_writes_is_finished_by_the_same_command(
    source: Path, uninterrupted: tuple[dict[str, str], int], tmp_path: Path, part: float
) -> None:
    expected, changes = uninterrupted
    job = replace(toy_job(source.parent, make=False), out=tmp_path / "out")
    assert run_and_kill(job, int(part * changes))
    run(job)
    assert digests(job.out) == expected


@pytest.mark.parametrize("left", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17, 23, 31, 40])
def test_a_run_killed_this_few_writes_before_its_end_is_finished_by_the_same_command(
    source: Path, uninterrupted: tuple[dict[str, str], int], tmp_path: Path, left: int
) -> None:
    expected, changes = uninterrupted
    job = replace(toy_job(source.parent, make=False), out=tmp_path / "out")
    assert run_and_kill(job, changes - left)
    run(job)
    assert digests(job.out) == expected


def test_a_run_killed_again_and_again_gets_there_with_the_same_bytes(
    source: Path, uninterrupted: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    expected, changes = uninterrupted
    job = replace(toy_job(source.parent, make=False), out=tmp_path / "out")
    kills = 0
    while run_and_kill(job, changes // 4):
        kills += 1
    assert kills >= 4
    assert digests(job.out) == expected


def test_a_finished_block_is_not_done_again(
    source: Path, uninterrupted: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    job = replace(toy_job(source.parent, make=False), out=tmp_path / "out")
    assert run_and_kill(job, int(0.6 * uninterrupted[1]))
    before = dict(_journal(job.out))
    assert len(before) >= 3
    report = run(job)
    again = {b["block"]: b for b in report["blocks"]}
    assert all(again[block] == {**record, "finished": n} for n, (block, record) in enumerate(before.items()))


def _journal(out: Path) -> dict[str, dict[str, object]]:
    identity = Journal.identity_of(out)
    assert identity is not None
    journal = Journal.open(out, identity, resume=True)
    journal.close()
    return journal.done


def killed(source: Path, out: Path) -> Job:
    job = replace(toy_job(source.parent, make=False), out=out)
    assert run_and_kill(job, KILLED_AFTER)
    return job


def refusal(job: Job) -> Dsv4qError:
    with pytest.raises(Dsv4qError) as caught:
        run(job)
    return caught.value


def test_resume_with_another_config_is_refused_and_the_key_named(source: Path, tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    changed = job.config.model_copy(update={"activations": job.config.activations.model_copy(update={"headroom": 4.0})})
    error = refusal(replace(job, config=changed))
    assert isinstance(error, ResumeError)
    assert "config.activations.headroom" in str(error) and "2.0" in str(error) and "4.0" in str(error)


def test_resume_with_other_data_is_refused_and_the_difference_named(source: Path, tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"text": "line {i} says something else entirely"}}\n' for i in range(400)))
    chosen = job.config.calibration
    assert chosen is not None
    changed = job.config.model_copy(update={"calibration": chosen.model_copy(update={"dataset": str(other)})})
    said = str(refusal(replace(job, config=changed)))
    assert "another data" in said and "data.digest" in said


def test_resume_with_data_that_changed_under_the_same_name_is_refused(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    job = replace(toy_job(source.parent, make=False), source=copy, out=tmp_path / "out")
    assert run_and_kill(job, 500)
    samples = copy / "chat_samples.jsonl"
    samples.write_text(samples.read_text().replace("the", "tho"))
    assert "data.digest" in str(refusal(job))


def test_resume_with_another_source_is_refused_and_the_file_named(source: Path, tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    other = toy_job(tmp_path / "elsewhere", seed=1).source
    error = refusal(replace(job, source=other))
    assert isinstance(error, ResumeError) and "source" in str(error)


def test_no_resume_starts_over_and_gives_the_same_bytes(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    run(replace(job, resume=False))
    assert digests(job.out) == whole


def test_a_torn_last_line_of_the_journal_is_forgotten(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    journal = job.out / ".dsv4q" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"block": "layers.4", "dig')
    run(job)
    assert digests(job.out) == whole


def test_a_shard_that_vanished_from_an_unfinished_run_is_named(source: Path, tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    next(job.out.glob("model-00001-*")).unlink()
    error = refusal(job)
    assert isinstance(error, OutputError) and "model-00001" in str(error)


def test_residual_streams_that_vanished_are_computed_again(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    for path in (job.out / ".dsv4q").glob("streams.*"):
        path.unlink()
    run(job)
    assert digests(job.out) == whole


def test_a_run_that_saved_no_residual_streams_is_resumed_with_the_same_bytes(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residuals, "WORK_PER_SAVE", float("inf"))
    job = killed(source, tmp_path / "out")
    assert not list((job.out / ".dsv4q").glob("streams.*"))
    run(job)
    assert digests(job.out) == whole


def test_residual_streams_that_live_on_disk_give_the_same_bytes(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residuals, "STREAMS_IN_MEMORY", 0)
    job = killed(source, tmp_path / "out")
    assert list((job.out / ".dsv4q").glob("streams.*"))
    run(job)
    assert digests(job.out) == whole


def test_a_finished_artifact_is_left_as_it_is_by_the_same_command(source: Path, tmp_path: Path) -> None:
    job = replace(toy_job(source.parent, make=False), out=tmp_path / "out")
    first = run(job)
    stamps = {p: p.stat().st_mtime_ns for p in job.out.rglob("*")}
    assert run(job) == first
    assert {p: p.stat().st_mtime_ns for p in job.out.rglob("*")} == stamps


def test_a_finished_artifact_is_not_overwritten_by_another_config(source: Path, tmp_path: Path) -> None:
    job = replace(toy_job(source.parent, make=False), out=tmp_path / "out")
    run(job)
    other = load_config(CONFIGS / "w4a16-fp8-mtp.yaml")
    error = refusal(replace(job, config=other))
    assert isinstance(error, OutputError) and "finished artifact" in str(error)


def test_a_second_run_into_the_same_folder_at_once_is_refused(source: Path, tmp_path: Path) -> None:
    job = killed(source, tmp_path / "out")
    identity = Journal.identity_of(job.out)
    assert identity is not None
    held = Journal.open(job.out, identity, resume=True)
    try:
        assert "Another run" in str(refusal(job))
    finally:
        held.close()
