"""Which inputs `dsv4q eval` rounds, and what it says of those beyond their calibrated range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from artifact_maker import read
from dsv4q.evaluation.clipping import Clipping, Tally, class_of
from dsv4q.evaluation.emulate import calibrated_limit, fp8_input, quantizer, rounds_inputs
from dsv4q.evaluation.rounding import Emulation
from dsv4q.evaluation.side import Side, open_side
from dsv4q.layout import Dims, source_tensors
from dsv4q.made_up.native import grid_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.library import library_scheme
from dsv4q.verify.schemes import FP8, INT, NVFP4, closed_scheme
from eval_toys import changed, run_eval, write_exact_artifact
from runs import run, toy_job
from test_end_to_end import command

W13, W2 = "routed experts w1, w3", "routed experts w2"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exact_artifact(tmp_path_factory.mktemp("activations"))


def in_memory(artifact: Path, emulation: Emulation, block: str = "layers.1") -> Side:
    side = open_side("artifact", artifact, torch.device("cpu"), emulation)
    for piece in side.pieces(block):
        side.install(piece, piece.load())
    side.emulate_inputs(block)
    return side


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------ what is rounded


def evaluated(grid: Path, activations: str) -> dict[str, Any]:
    line = ("eval", str(grid / "out"), "--reference", str(grid / "source"), "--device", "cpu", "--json")
    small = ("--samples", "2", "--length", "32", "--activations", activations)
    return dict(json.loads(command(*line, *small).stdout))


def test_with_no_input_rounded_an_exact_artifact_is_its_source(grid: Path) -> None:
    found = evaluated(grid, "none")
    assert found["kl_divergence"]["value"] == 0.0 and found["top1_agreement"]["value"] == 1.0
    assert found["activations"] == "none" and found["rounded_inputs"] == {}
    assert found["clipping"] == {"classes": {}, "blocks": []} and sum(found["emulated"].values()) == 145


def test_weight_only_nvfp4_rounds_the_inputs_of_fp8_linears_alone(grid: Path) -> None:
    found, kernels = evaluated(grid, "weight-only-nvfp4"), evaluated(grid, "kernels")
    assert kernels["rounded_inputs"] == kernels["emulated"] == {FP8: 25, NVFP4: 120}
    assert found["rounded_inputs"] == {FP8: 25} and found["clipping"]["classes"] == {}
    assert 0 < found["kl_divergence"]["value"] < kernels["kl_divergence"]["value"]


@torch.no_grad()
def test_an_expert_without_rounding_is_its_weight_and_attention_still_rounds(grid: Path) -> None:
    side = in_memory(grid / "out", Emulation.WEIGHT_ONLY_NVFP4)
    expert = side.model.get_submodule("model.layers.1.mlp.experts.2.down_proj")
    attention = side.model.get_submodule("model.layers.1.self_attn.kv_proj")
    x, wide = random(5, 128), random(5, 256)
    assert torch.equal(expert(x), F.linear(x, expert.weight))
    assert torch.equal(attention(wide), F.linear(fp8_input(wide), attention.weight))


@pytest.mark.parametrize(
    ("scheme", "kernels", "weight_only"),
    [
        (closed_scheme("g", NVFP4, 4, 16, True), True, False),
        (closed_scheme("g", NVFP4, 4, 16, False), False, False),
        (closed_scheme("g", FP8, 8, None, True), True, True),
        (closed_scheme("g", INT, 4, 128, False), False, False),
    ],
    ids=["NVFP4", "NVFP4 weight-only", "FP8", "INT4"],
)
def test_a_scheme_is_counted_as_rounding_where_it_has_a_rounding(scheme: Any, kernels: bool, weight_only: bool) -> None:
    assert rounds_inputs(scheme) is kernels is (quantizer(scheme, {}, torch.ones(1)) is not None)
    assert (rounds_inputs(scheme) and Emulation.WEIGHT_ONLY_NVFP4.rounds(scheme)) is weight_only
    assert not Emulation.NONE.rounds(scheme)


def test_an_unknown_value_is_refused_with_those_that_there_are(grid: Path) -> None:
    with pytest.raises(AssertionError, match="weight-only-nvfp4"):
        evaluated(grid, "sm90")


# ------------------------------------------------------------------------------------------------ clipping

AMAX = st.integers(0x3000, 0x4800)
"""Bits of a positive BF16 number from 4.7e-10 to 131072."""


def bf16(bits: int) -> Tensor:
    return torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)


@given(AMAX)
def test_the_calibrated_amax_itself_is_within_its_range_and_the_next_number_is_not(bits: int) -> None:
    amax, above = bf16(bits), bf16(bits + 1)
    divisor = 448 * 6 / amax.float()
    limit = calibrated_limit(closed_scheme("g", NVFP4, 4, 16, True), {}, divisor)
    assert limit is not None
    tally = Tally()
    tally.add(torch.cat([amax, -amax])[None], limit)
    assert int(tally.beyond) == 0 and float(tally.largest) == pytest.approx(1)
    tally.add(torch.cat([above, -above, amax])[None], limit)
    assert tally.as_dict() == {
        "clipped_values": 2 / 5, "clipped_inputs": 1 / 2, "largest": pytest.approx(float(above / amax), rel=0.01),
    }  # fmt: skip


@torch.no_grad()
def test_inputs_of_experts_are_counted_under_the_widest_range_of_the_layer(grid: Path) -> None:
    side, tensors = in_memory(grid / "out", Emulation.KERNELS), read(grid / "out")
    divisors = [float(t) for n, t in tensors.items() if n.startswith("layers.1.ffn.experts.") and "w2.input_g" in n]
    limit = 448 * 6 / min(divisors)
    assert limit > 448 * 6 / max(divisors)
    x = torch.full((4, 128), 0.9 * limit).to(torch.bfloat16)
    x[1, 3], x[2, :2] = 2 * limit, -1.5 * limit
    side.model.get_submodule("model.layers.1.mlp.experts.2.down_proj")(x)
    (one,) = side.clipping.as_dict()["blocks"]
    assert one == {
        "class": W2, "block": "layers.1", "clipped_values": 3 / 512, "clipped_inputs": 2 / 4,
        "largest": pytest.approx(2, rel=0.01),
    }  # fmt: skip


def test_a_range_that_is_too_narrow_shows_in_its_class_and_block_alone(grid: Path, tmp_path: Path) -> None:
    names = [
        n for n in read(grid / "out") if n.startswith("layers.4.ffn.experts.") and n.endswith("w2.input_global_scale")
    ]
    narrow = changed(grid / "out", tmp_path / "narrow", {n: read(grid / "out")[n] * 16 for n in names})
    before, after = (
        {(one["class"], one["block"]): one for one in run_eval(out, grid / "source")["clipping"]["blocks"]}
        for out in (grid / "out", narrow)
    )
    assert after[W2, "layers.4"]["largest"] == pytest.approx(16 * before[W2, "layers.4"]["largest"], rel=1e-3)
    assert after[W2, "layers.4"]["clipped_values"] > 0.001 > before[W2, "layers.4"]["clipped_values"]
    assert {key: one for key, one in after.items() if key != (W2, "layers.4")} == {
        key: one for key, one in before.items() if key != (W2, "layers.4")
    }


def test_every_class_with_a_calibrated_scale_is_there_and_no_other(grid: Path) -> None:
    found = run_eval(grid / "out", grid / "source")["clipping"]
    assert set(found["classes"]) == {W13, W2}
    assert len(found["blocks"]) == 2 * 5
    assert all(one["clipped_inputs"] >= one["clipped_values"] >= 0 for one in found["blocks"])


def test_a_draft_with_nvfp4_experts_is_a_class_of_its_own(tmp_path: Path) -> None:
    write_toy(tmp_path / "source", form=grid_form())
    run(toy_job(tmp_path, "nvfp4-fp8-mtp-nvfp4", make=False))
    classes = run_eval(tmp_path / "out", tmp_path / "source")["clipping"]["classes"]
    assert set(classes) == {W13, W2, f"draft's {W13}", f"draft's {W2}"}
    # Its ranges are bounds, which no input can pass.
    assert classes[f"draft's {W13}"]["clipped_values"] == classes[f"draft's {W2}"]["clipped_values"] == 0.0


def test_static_scales_of_other_schemes_are_ranges_too() -> None:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
    }
    scheme, stored = library_scheme("g", "int-quantized", group), {"input_scale": torch.tensor([0.5])}
    limit = calibrated_limit(scheme, stored, None)
    assert limit is not None and limit.tolist() == [127 * 0.5]
    group["input_activations"] |= {"dynamic": True, "strategy": "token"}  # type: ignore[operator]
    assert calibrated_limit(library_scheme("g", "int-quantized", group), {}, None) is None


def test_nothing_is_counted_while_counting_is_off() -> None:
    specs = [s for s in source_tensors(Dims.from_config(ToyConfig().as_config_json())) if s.is_quantizable]
    clipping = Clipping(counting=False)
    same = clipping.watched(specs[0], torch.ones(1), lambda x: x)
    assert torch.equal(same(torch.full((2, 2), 9.0)), torch.full((2, 2), 9.0)) and not clipping.tallies
    clipping.counting = True
    same(torch.full((2, 2), 9.0))
    assert clipping.as_dict()["classes"][class_of(specs[0])]["clipped_values"] == 1.0
