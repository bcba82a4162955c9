"""What nothing computes with is copied while the rest of a run begins."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.source import Checkpoint, scan
from dsv4q.checkpoint.writer import ShardWriter
from dsv4q.plan.plan import make_plan
from dsv4q.plan.work import WorkTable
from dsv4q.quantize import Job
from dsv4q.run import pipeline
from runs import run, toy_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return toy_job(tmp_path, "nvfp4-fp8-mtp")


def plan_of(job: Job) -> Any:
    return make_plan(scan(job.source), job.config)


def test_head_and_draft_are_written_before_there_is_a_model(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(job)
    missing = {tensor.name for block in ("head", "mtp.0") for tensor in plan.block_tensors(block)}
    put_all, build = ShardWriter.put_all, pipeline.build_meta_model

    def watch(self: ShardWriter, tensors: Iterable[tuple[str, Any]]) -> None:
        some = list(tensors)
        put_all(self, some)
        missing.difference_update(name for name, _ in some)

    def build_late(*arguments: Any) -> Any:
        until = time.monotonic() + 30
        while missing and time.monotonic() < until:
            time.sleep(0.01)
        assert not missing
        return build(*arguments)

    monkeypatch.setattr(ShardWriter, "put_all", watch)
    monkeypatch.setattr(pipeline, "build_meta_model", build_late)
    assert run(job)["warnings"] == []


@pytest.mark.parametrize(
    ("config", "copied"),
    [("nvfp4-fp8-mtp", ("head", "mtp.0")), ("nvfp4-fp8", ("head",)), ("nvfp4-fp8-mtp-nvfp4", ("head",))],
)
def test_only_what_is_neither_encoded_nor_in_the_forward_is_copied_first(
    config: str, copied: tuple[str, ...], tmp_path: Path
) -> None:
    work = WorkTable(plan_of(toy_job(tmp_path, config)))
    assert work.copied == copied
    assert not any(one.computed for block in copied for one in work.blocks[block])


def test_a_run_that_fails_early_does_not_wait_until_all_is_copied(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Checkpoint.tensor
    draft: list[str] = []

    def slowly(self: Checkpoint, name: str) -> torch.Tensor:
        if name.startswith("mtp."):
            draft.append(name)
            time.sleep(0.05)
        return read(self, name)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "tensor", slowly)
    monkeypatch.setattr(pipeline, "build_meta_model", fail)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert len(draft) < len(plan_of(job).block_tensors("mtp.0")) / 2


def test_what_was_copied_is_not_copied_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Journal.finish_block

    def die(self: Journal, block: str, record: dict[str, Any]) -> None:
        finish(self, block, record)
        if block == "layers.0":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_block", die)
        with pytest.raises(KeyboardInterrupt):
            run(job)
    read = Checkpoint.tensor
    seen: list[str] = []

    def note(self: Checkpoint, name: str) -> torch.Tensor:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", note)
    report = run(job)
    assert not [name for name in seen if name.startswith("mtp.")]
    assert [b["finished"] for b in report["blocks"]] == [0, *range(3, 8), 1, 2]
