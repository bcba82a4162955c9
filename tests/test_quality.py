"""scripts/quality.py on a toy of two layers and a few tokens: that its tables say what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from test_scripts import SCRIPTS, run_script

SMALL = ("--samples", 2, "--length", 32, "--micro-batch", 2, "--calibrate", 2, "--calibrate-length", 32)
TOY = ToyConfig(compress_ratios=(0, 4), num_hash_layers=1, n_routed_experts=4, shards=1)

Run = tuple[Path, str, dict[str, Any]]


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("quality", SCRIPTS / "quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """WORK, what was printed, and the numbers of one run."""
    work = tmp_path_factory.mktemp("quality")
    write_toy(work / "toy", TOY, form=native_form())
    text = run_script("quality.py", work / "out", "--checkpoint", work / "toy", *SMALL)
    return work / "out", text, json.loads((work / "out" / "quality.json").read_text())


def test_every_config_is_quantized_and_evaluated_on_the_same_text(compared: Run) -> None:
    work, _, found = compared
    results = [c[kind] for c in found["columns"].values() for kind in ("eval", "weights_alone")] + [found["pair"]]
    assert len(results) == 7 and len({result["data"]["digest"] for result in results}) == 1
    for column in found["columns"].values():
        assert (work / column["config"] / "model.safetensors.index.json").is_file()


def test_the_exact_weights_alone_are_the_reference_itself(compared: Run) -> None:
    exact = compared[2]["columns"]["exact"]
    assert exact["weights_alone"]["kl_divergence"]["value"] == 0.0 and exact["weights_alone"]["emulated"] == {}
    assert exact["eval"]["kl_divergence"]["value"] > 0.0
    assert exact["errors"]["routed expert"]["relative_error"] == 0.0


def test_minmax_weights_alone_are_not_the_reference(compared: Run) -> None:
    minmax = compared[2]["columns"]["min/max"]
    assert minmax["weights_alone"]["kl_divergence"]["value"] > 0.0
    assert minmax["errors"]["routed expert"]["relative_error"] > 0.04


def test_the_table_shows_the_numbers_that_were_measured(compared: Run) -> None:
    work, text, found = compared
    assert (work / "quality.md").read_text() == text
    assert "| weight error, routed experts |  | 0.00%, 24 of 24 exact | 6." in text
    for column in found["columns"].values():
        assert f"{column['eval']['perplexity']['artifact']['value']:.4f} (" in text
        assert f" {column['bytes'] / 1e6:.2f} |" in text


@pytest.mark.parametrize(
    ("low", "high", "bold"), [(-0.2, -0.1, True), (0.1, 0.2, True), (-0.1, 0.2, False), (0.0, 0.0, False)]
)
def test_a_difference_is_bold_only_if_its_interval_leaves_out_zero(
    quality: Any, low: float, high: float, bold: bool
) -> None:
    text = quality.points({"value": (low + high) / 2, "low": low, "high": high})
    assert text.startswith("**") is bold and text.endswith("**") is bold


def test_one_sample_has_no_interval_and_is_never_significant(quality: Any) -> None:
    assert quality.points({"value": 0.5, "low": None, "high": None}) == "+50.00"
    assert quality.spread({"value": None, "low": None, "high": None}, ".2%") == "none"
