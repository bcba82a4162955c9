"""scripts/quality.py on a toy of two layers and a few tokens: that its tables say what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from test_scripts import SCRIPTS, run_script

SMALL = (
    "--samples", 2, "--length", 32, "--micro-batch", 2, "--calibrate", 2, "--calibrate-length", 32,
    "--answers", 2, "--answer-tokens", 4,
)  # fmt: skip
TOY = ToyConfig(compress_ratios=(0, 4), num_hash_layers=1, n_routed_experts=4, shards=1)

Run = tuple[Path, str, dict[str, Any]]


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("quality", SCRIPTS / "quality.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["quality"] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """WORK, what was printed, and the numbers of one run."""
    work = tmp_path_factory.mktemp("quality")
    write_toy(work / "toy", TOY, form=native_form())
    text = run_script("quality.py", work / "out", "--models", work / "toy", *SMALL)
    return work / "out", text, json.loads((work / "out" / "quality.json").read_text())["toy"]


def test_every_config_is_quantized_and_evaluated_on_the_same_text(compared: Run) -> None:
    work, _, found = compared
    results = [c[kind] for c in found["columns"].values() for kind in ("eval", "sm90", "weights_alone")]
    results += [found["pair"], *found["ranges"].values()]
    assert len(results) == 14 and len({result["data"]["digest"] for result in results}) == 1
    for column in found["columns"].values():
        assert (work / "toy" / column["config"] / "model.safetensors.index.json").is_file()


def test_each_table_is_made_of_results_with_the_rounding_that_it_names(compared: Run) -> None:
    for column in compared[2]["columns"].values():
        assert column["weights_alone"]["activations"] == "none"
        rounded = [column[kind]["rounded_inputs"] for kind in ("eval", "sm90")]
        assert rounded[1] == {form: n for form, n in rounded[0].items() if form == "float-quantized"}


def test_the_exact_weights_alone_are_the_reference_itself(compared: Run) -> None:
    exact = compared[2]["columns"]["exact"]
    assert exact["weights_alone"]["kl_divergence"]["value"] == 0.0 and exact["weights_alone"]["rounded_inputs"] == {}
    assert exact["eval"]["kl_divergence"]["value"] > 0.0
    assert exact["errors"]["routed expert"]["relative_error"] == 0.0


def test_minmax_weights_alone_are_not_the_reference(compared: Run) -> None:
    minmax = compared[2]["columns"]["min/max"]
    assert minmax["weights_alone"]["kl_divergence"]["value"] > 0.0
    assert minmax["errors"]["routed expert"]["relative_error"] > 0.04


def test_the_table_shows_the_numbers_that_were_measured(compared: Run) -> None:
    work, text, found = compared
    assert (work / "quality.md").read_text() == text
    assert text.startswith("## toy\n")
    assert "| weight error, routed experts |  | 0.00%, 24 of 24 exact | 6." in text
    assert f" {found['ranges']['bound']['kl_divergence']['value'] * 1000:.3f} (" in text
    for side in ("reference", "artifact"):
        rate = found["columns"]["W4A16"]["eval"]["answers"][side]["k_1"]["acceptance"]["value"]
        assert f"{rate:.2%}" in text
    for column in found["columns"].values():
        assert f"{column['eval']['perplexity']['artifact']['value']:.4f} (" in text
        assert f" {column['bytes'] / 1e6:.2f} |" in text


def test_wider_ranges_halve_what_is_seen_of_them_and_bounds_clip_nothing(compared: Run) -> None:
    ranges = compared[2]["ranges"]
    assert list(ranges) == ["headroom 1", "headroom 2", "headroom 4", "bound"]
    for name, one in ranges["headroom 1"]["clipping"]["classes"].items():
        halves = [ranges[label]["clipping"]["classes"][name]["largest"] for label in ("headroom 2", "headroom 4")]
        # Not quite, for what is rounded in the first layer changes what reaches the second one.
        assert halves == [pytest.approx(one["largest"] / n, rel=0.1) for n in (2, 4)]
        assert ranges["bound"]["clipping"]["classes"][name]["clipped_values"] == 0.0


def test_a_result_is_held_against_another_sample_by_sample(compared: Run, quality: Any) -> None:
    exact, minmax = (compared[2]["columns"][label]["eval"] for label in ("exact", "min/max"))
    kl = quality.paired(minmax, exact, quality.of_samples("kl_divergence"), "difference")
    assert kl["value"] == pytest.approx(minmax["kl_divergence"]["value"] - exact["kl_divergence"]["value"])
    ratio = quality.paired(minmax, exact, quality.of_samples("nll"), "ratio")
    ratios = [one["perplexity"]["ratio"]["value"] for one in (minmax, exact)]
    assert ratio["value"] == pytest.approx(ratios[0] / ratios[1])
    accepted = quality.paired(minmax, exact, quality.of_drafts(1), "difference")
    own = [quality.own_acceptance("artifact", "step_1")(one)["value"] for one in (minmax, exact)]
    assert accepted["value"] == pytest.approx(own[0] - own[1])


@pytest.mark.parametrize(
    ("value", "low", "high", "tokens"),
    [
        (0.2, 0.1, 0.4, 250),
        (-0.2, -0.4, -0.1, 250),
        (0.1, -0.1, 0.2, 4000),
        (0.0, 0.0, 0.0, None),
        (None, None, None, None),
    ],
)
def test_the_tokens_that_a_difference_needs_go_with_the_square_of_its_interval(
    quality: Any, value: float | None, low: float | None, high: float | None, tokens: int | None
) -> None:
    assert quality.tokens_needed({"value": value, "low": low, "high": high}, 0.0, 1000) == tokens


@pytest.mark.parametrize(
    ("low", "high", "bold"), [(-0.2, -0.1, True), (0.1, 0.2, True), (-0.1, 0.2, False), (0.0, 0.0, False)]
)
def test_a_difference_is_bold_only_if_its_interval_leaves_out_zero(
    quality: Any, low: float, high: float, bold: bool
) -> None:
    found = {"value": (low + high) / 2, "low": low, "high": high}
    text = quality.points("a difference", lambda _: found).cell({})
    assert text.startswith("**") is bold and text.endswith("**") is bold


def test_one_sample_has_no_interval_and_is_never_significant(quality: Any) -> None:
    one = {"value": 0.5, "low": None, "high": None}
    assert quality.points("a difference", lambda _: one).cell({}) == "+50.00"
    assert quality.tokens_needed(one, 0.0, 1000) is None
    assert quality.spread({"value": None, "low": None, "high": None}, ".2%") == "none"
