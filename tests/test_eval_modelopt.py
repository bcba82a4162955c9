"""`dsv4q eval` on ModelOpt's layout: the figures of the artifact that it was exported from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from artifact_maker import copy, edit
from dsv4q.errors import SourceError
from eval_toys import CYCLE, run_eval
from export_toys import EXPERT, native_toy, quantized, tensors, to_modelopt

VARYING = ("seconds", "peak_memory", "artifact", "reference")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = native_toy(tmp_path_factory.mktemp("source") / "native")
    (folder / "heldout.txt").write_text(CYCLE * 40, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def artifact(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With input scales that are powers of two, so that their reciprocals are exact in both layouts."""
    folder = quantized(native, tmp_path_factory.mktemp("artifact") / "out")
    scales = {n: t for n, t in tensors(folder).items() if n.endswith("input_global_scale")}
    edit(folder, {n: torch.tensor([2.0 ** round(math.log2(t.item()))]) for n, t in scales.items()})
    return folder


@pytest.fixture(scope="module")
def modelopt(native: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_modelopt(artifact, native, tmp_path_factory.mktemp("modelopt") / "out")


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in VARYING}


def test_the_figures_are_those_of_the_artifact_that_was_exported(native: Path, artifact: Path, modelopt: Path) -> None:
    ours, theirs = run_eval(artifact, native), run_eval(modelopt, native)
    assert figures(theirs) == figures(ours)
    assert theirs["kl_divergence"]["value"] > 0 and theirs["emulated"] == ours["emulated"] != {}
    assert theirs["artifact"]["form"] == "modelopt"


def test_it_can_be_the_reference(native: Path, artifact: Path, modelopt: Path) -> None:
    found = run_eval(artifact, modelopt, file=native / "heldout.txt")
    assert found["kl_divergence"]["value"] == 0 and found["top1_agreement"]["value"] == 1
    assert {error["relative_error"] for error in found["residual"]} == {0.0}


def test_an_expert_that_was_changed_changes_the_figures(native: Path, modelopt: Path, tmp_path: Path) -> None:
    other = copy(modelopt, tmp_path / "other")
    edit(other, {f"{EXPERT}.weight_scale_2": tensors(modelopt)[f"{EXPERT}.weight_scale_2"] * 64})
    before, after = (run_eval(folder, native)["kl_divergence"]["value"] for folder in (modelopt, other))
    assert after != before


@pytest.mark.parametrize(
    "name", [f"{EXPERT}.weight", f"{EXPERT}.weight_scale_2", f"{EXPERT}.input_scale", "layers.1.attn.wo_b.weight"]
)
def test_a_missing_tensor_is_named_as_in_the_files(native: Path, modelopt: Path, tmp_path: Path, name: str) -> None:
    broken = copy(modelopt, tmp_path / "broken")
    edit(broken, {name: None})
    with pytest.raises(SourceError) as caught:
        run_eval(broken, native)
    assert name in str(caught.value) or name.replace(".weight", ".scale") in str(caught.value)


def test_a_scale_that_is_none_is_named(native: Path, modelopt: Path, tmp_path: Path) -> None:
    broken = copy(modelopt, tmp_path / "broken")
    edit(broken, {f"{EXPERT}.input_scale": torch.tensor(0.0)})
    with pytest.raises(SourceError, match="input scale"):
        run_eval(broken, native)
