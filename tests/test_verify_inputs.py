"""Input scales that weights, clamp and the layer's other experts cannot explain are named; honest ones are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import artifact_maker as maker
import runs
from artifact_maker import edit, read
from dsv4q.__main__ import main
from dsv4q.verify.inputs import _bounds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy and its artifact."""
    folder = tmp_path_factory.mktemp("made")
    runs.run(runs.toy_job(folder))
    return folder


def judged(capsys: pytest.CaptureFixture[str], artifact: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the real command."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--deep", *map(str, arguments), "--json"])
    return stopped.value.code or 0, json.loads(capsys.readouterr().out)  # type: ignore[return-value]


def _named(result: dict[str, Any]) -> set[str]:
    return {d["tensor"] for d in result["differences"] if d["check"] == "inputs"}


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e-3, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("projections", [("w2",), ("w1", "w3")])
def test_an_input_scale_far_off_in_either_direction_is_named(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    projections: tuple[str, ...],
    factor: float,
) -> None:
    artifact = maker.copy(folder / "out", tmp_path / "a")
    names = {f"layers.2.ffn.experts.1.{p}.input_global_scale" for p in projections}
    edit(artifact, {name: read(artifact)[name] * factor for name in names})
    code, result = judged(capsys, artifact, "--source", folder / "source")
    assert (code, _named(result)) == (3, names)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("projection", ["w1", "w2"])
def test_the_input_scales_of_a_whole_layer_are_held_against_bounds_and_other_layers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], projection: str, factor: float
) -> None:
    artifact = maker.copy(folder / "out", tmp_path / "a")
    ends = {"w1": ("w1", "w3"), "w2": ("w2",)}[projection]
    names = {n for n in read(artifact) if n.startswith("layers.1.") and n.endswith("input_global_scale")}
    names = {n for n in names if n.split(".")[-2] in ends}
    edit(artifact, {name: read(artifact)[name] * factor for name in names})
    code, result = judged(capsys, artifact)
    assert (code, _named(result)) == (3, names)


@pytest.mark.parametrize(
    "activations",
    [
        {"headroom": 1000.0},
        {"experts": "routed", "fallback": "layer_max"},
        {"scales": "bound"},
    ],
    ids=str,
)
def test_honest_input_scales_are_plausible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], activations: dict[str, object]
) -> None:
    job = runs.toy_job(tmp_path)
    settings = type(job.config.activations)(**activations)
    changes: dict[str, Any] = {"activations": settings}
    if settings.scales == "bound":
        changes["calibration"] = None
    runs.run(replace(job, config=job.config.model_copy(update=changes)))
    code, result = judged(capsys, job.out, "--source", job.source)
    assert (code, result["differences"]) == (0, [])


@pytest.mark.parametrize("zeros", [True, False])
def test_an_expert_that_passes_nothing_on_may_have_any_input_scale(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], zeros: bool
) -> None:
    artifact, expert = maker.copy(folder / "out", tmp_path / "a"), "layers.2.ffn.experts.1"
    (artifact / "report.json").unlink()
    scale = f"{expert}.w2.input_global_scale"
    changes = {scale: torch.full((1,), 0.01)}
    if zeros:
        packed = read(artifact)[f"{expert}.w1.weight_packed"]
        changes[f"{expert}.w1.weight_packed"] = packed & 0x88  # and the signs of zeros
    edit(artifact, changes)
    assert _named(judged(capsys, artifact)[1]) == (set() if zeros else {scale})


def test_every_token_lies_between_the_bounds_of_its_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, generator=generator).exp()
    least, most = _bounds(weight)
    tokens = torch.randn(500, 64, generator=generator) * torch.randn(500, 64, generator=generator).exp()
    tokens = torch.cat([tokens, 1 / weight[None], torch.eye(64)])
    largest = (torch.nn.functional.rms_norm(tokens, (64,)) * weight).abs().amax(dim=1).double()
    assert float(largest.min()) >= least * (1 - 1e-6) and float(largest.max()) <= most * (1 + 1e-6)
    assert float(largest[500]) == pytest.approx(least)
