"""The routed experts as stacks and as modules under llmcompressor's hooks: the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4q.config import Config, load_config, parse_config
from dsv4q.formats.kernels import swiglu, swiglu_parts
from dsv4q.plan import plan as planning
from dsv4q.quantize import Job
from dsv4q.run import stacked as stacks
from dsv4q.run.experts import BatchedExperts
from dsv4q.run.memory import WideExperts
from runs import CONFIGS, finished_files, run, toy_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return toy_job(tmp_path_factory.mktemp("stacks"))


def changed(config: Config, **activations: Any) -> Config:
    raw = config.model_dump(mode="json")
    return parse_config({**raw, "activations": {**raw["activations"], **activations}})


def minmax(config: Config) -> Config:
    """The same on the same data, with stock observers."""
    raw = load_config(CONFIGS / "nvfp4-fp8-mtp-minmax.yaml").model_dump(mode="json")
    return parse_config({**raw, "calibration": config.model_dump(mode="json")["calibration"]})


CASES = {
    "exact": lambda config: config,
    "minmax": minmax,
    "routed": lambda config: changed(config, experts="routed", fallback="layer_max"),
    "headroom": lambda config: changed(config, headroom=3.0),
    "bound": lambda config: parse_config(
        {**config.model_dump(mode="json"), "activations": "bound", "calibration": None}
    ),
}


@dataclass(frozen=True)
class Stacked:
    """A run by stacks, and the layouts that its blocks had."""

    job: Job
    layouts: list[stacks.StackLayout | None]


@pytest.fixture(scope="module", params=CASES)
def stacked(request: pytest.FixtureRequest, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Stacked:
    real = stacks.StackLayout.of
    out = tmp_path_factory.mktemp(request.param) / "out"
    made = Stacked(replace(job, config=CASES[request.param](job.config), out=out), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks.StackLayout, "of", lambda members: made.layouts.append(real(members)) or made.layouts[-1])
        run(made.job)
    return made


def test_stacks_and_modules_write_the_same_bytes(
    stacked: Stacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = stacked.job, replace(stacked.job, out=tmp_path / "slow")
    monkeypatch.setattr(planning, "_experts_in_stacks", lambda *_: False)
    run(slow)
    names = [name for name in finished_files(fast.out) if name != "report.json"]
    assert names and all((fast.out / n).read_bytes() == (slow.out / n).read_bytes() for n in names)


def test_the_shipped_schemes_are_known_to_the_stacks(stacked: Stacked) -> None:
    assert stacked.layouts and all(layout is not None for layout in stacked.layouts)


def random_memory(experts: int) -> WideExperts:
    generator = torch.Generator().manual_seed(experts)
    shapes = {"gate_up": (experts, 2, 32, 64), "down": (experts, 1, 64, 32)}
    return WideExperts({n: (torch.randn(s, generator=generator) / 8).to(torch.bfloat16) for n, s in shapes.items()})


@pytest.mark.parametrize("all_tokens", [True, False])
def test_an_expert_that_no_token_reaches_is_told_apart(all_tokens: bool) -> None:
    experts = BatchedExperts(random_memory(4), 10.0, all_tokens)
    x = torch.randn(5, 64).to(torch.bfloat16)
    experts(x, torch.tensor([[0, 2]] * 5), torch.ones(5, 2, dtype=torch.bfloat16))
    assert experts.seen.tolist() == [True, all_tokens, True, all_tokens]
    assert experts.counts.tolist() == [5, 0, 5, 0]


def test_the_ends_of_several_batches_are_those_of_one(tmp_path: Path) -> None:
    x, index = torch.randn(12, 64).to(torch.bfloat16), torch.randint(0, 4, (12, 1))
    share = torch.ones(12, 1, dtype=torch.bfloat16)
    once, twice = (BatchedExperts(random_memory(4), 10.0, all_tokens=True) for _ in range(2))
    once(x, index, share)
    for part in (slice(0, 7), slice(7, 12)):
        twice(x[part], index[part], share[part])
    assert torch.equal(once.input_ends, twice.input_ends)
    assert torch.equal(once.hidden_ends, twice.hidden_ends)


def test_a_non_finite_input_shows_in_the_ends() -> None:
    gate, up = (torch.randn(8, 32).to(torch.bfloat16) for _ in range(2))
    gate[3, 5] = float("nan")
    ends = torch.zeros(2, swiglu_parts(gate.numel()))
    swiglu(gate, up, 10.0, ends)
    assert bool(ends[:, 0].isnan().all()) and not ends[:, 1:].any()
