"""Checkpoints for the tests of `dsv4q eval`: a toy that has something to predict, and helpers to run and spoil one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from artifact_maker import copy, edit, read
from dsv4q.console import Console, Mode
from dsv4q.data.tokens import load_tokenizer
from dsv4q.evaluate import EvaluationRequest, evaluate
from dsv4q.evaluation.answers import AnswersRequest
from dsv4q.evaluation.data import DataRequest
from dsv4q.evaluation.rounding import Emulation
from dsv4q.made_up.native import grid_form
from dsv4q.made_up.toy import write_toy
from runs import run, toy_job

CYCLE = "!#$%&()*+/:;<=>@[]^_{|}~"
"""Characters that the toy's tokenizer knows one by one; the text repeats them in this order."""


def write_counting_toy(folder: Path, draft_gain: float = 1.0, seed: int = 0) -> Path:
    """A toy that knows the text `CYCLE` * n: after each of its characters it predicts the next.

    The embedding outweighs what the layers add, and the head's row of a token is the embedding of the token before it.
    The draft does the same with the embedding that it gets through e_proj, an identity times `draft_gain`; with a
    small gain the noise of the rest of the block wins now and then.
    """
    write_toy(folder, seed=seed)
    tensors = read(folder)
    ids = torch.tensor(load_tokenizer(folder).encode(CYCLE, add_special_tokens=False).ids)
    assert len(ids) == len(CYCLE) == len(ids.unique())
    embedding, head = tensors["embed.weight"].float(), tensors["head.weight"].clone()
    head[ids.roll(-1)] = (embedding[ids] / embedding.shape[1] ** 0.5).to(head.dtype)
    width = embedding.shape[1]
    edit(
        folder,
        {
            "embed.weight": (embedding * 30).to(torch.bfloat16),
            "head.weight": head,
            "mtp.0.e_proj.weight": (torch.eye(width) * draft_gain).to(torch.bfloat16),
        },
    )
    (folder / "heldout.txt").write_text(CYCLE * 40, encoding="utf-8")
    return folder


def write_exact_artifact(folder: Path) -> Path:
    """`source`, a toy on the grid, and `out`, its exact artifact, in `folder`."""
    write_toy(folder / "source", form=grid_form())
    run(toy_job(folder, make=False))
    return folder


def changed(source: Path, to: Path, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """A copy of a checkpoint with other values in some tensors."""
    copy(source, to)
    edit(to, changes)
    return to


def noise_like(source: Path, name: str, size: float = 1.0) -> torch.Tensor:
    """Random values of a tensor's shape and dtype."""
    tensor = read(source)[name]
    return (torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9)) * size).to(tensor.dtype)


def run_eval(
    artifact: Path,
    reference: Path,
    *,
    activations: Emulation = Emulation.KERNELS,
    answers: AnswersRequest | None = None,
    **request: Any,
) -> dict[str, Any]:
    """Evaluate on the CPU without a word."""
    wanted = DataRequest(**{"file": None, "samples": 3, "length": 48, "micro_batch": 2, **request})
    job = EvaluationRequest(artifact, reference, wanted, "cpu", activations, answers or AnswersRequest())
    return evaluate(job, Console(Mode.QUIET))


def pair(result: Mapping[str, Any], main: str, draft: str) -> dict[str, Any]:
    """Acceptance of one pair."""
    (found,) = [p for p in result["acceptance"]["pairs"] if (p["main"], p["draft"]) == (main, draft)]
    return dict(found)
