"""Emulated kernels against plain loops: rounded inputs, decoded weights, and the linear that has both."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from artifact_maker import fp8, int4, read
from dsv4q.evaluation.emulate import fp8_input, kernel_weight, nvfp4_input, quantizer, shares_input_scale
from dsv4q.evaluation.experts import RoundedExperts
from dsv4q.evaluation.side import Side, open_side
from dsv4q.layout import Dims, source_tensors
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.library import library_scheme
from dsv4q.verify.schemes import FP8, INT, NVFP4, closed_scheme
from eval_toys import changed
from runs import run, toy_job

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
INT8_BY_TOKEN = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(torch.bfloat16)


def nearest_e2m1(value: float) -> float:
    """By looking at all of them; of two that are equally near, the one with the even index."""
    gaps = [abs(abs(value) - float(one)) for one in E2M1]
    best = min(range(8), key=lambda i: (gaps[i], i % 2))
    return math.copysign(float(E2M1[best]), value)


def plain_nvfp4(x: Tensor, divisor: float) -> Tensor:
    """One group of 16 after the other."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for row, start in ((r, s) for r in range(x.shape[0]) for s in range(0, x.shape[1], 16)):
        group = x[row, start : start + 16].float()
        scale = (group.abs().max() / 6 * torch.tensor(divisor)).clamp(max=448.0)
        unit = scale.to(torch.float8_e4m3fn).float() / torch.tensor(divisor)
        values = [nearest_e2m1(float(v / unit)) if unit else 0.0 for v in group]
        out[row, start : start + 16] = torch.tensor(values) * unit
    return out.to(x.dtype)


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_nvfp4_input_is_what_a_plain_loop_gives(size: float) -> None:
    x = random(6, 64, size=size)
    divisor = 448 * 6 / float(x.abs().max())
    torch.testing.assert_close(nvfp4_input(x, torch.tensor([divisor])), plain_nvfp4(x, divisor), rtol=0, atol=0)


def test_nvfp4_input_beyond_the_calibrated_range_is_clipped() -> None:
    x = torch.full((1, 16), 4.0, dtype=torch.bfloat16)
    calibrated_to_1 = torch.tensor([448.0 * 6])
    assert nvfp4_input(x, calibrated_to_1).eq(1.0).all()


def test_nvfp4_input_far_below_the_calibrated_range_is_zero() -> None:
    x = torch.full((1, 16), 2.0**-20, dtype=torch.bfloat16)
    assert nvfp4_input(x, torch.tensor([448.0 * 6])).eq(0).all()


@given(st.integers(0, 2**32), st.integers(-3, 8), st.sampled_from([2, 4, 1024]))
def test_a_headroom_that_is_a_power_of_two_rounds_the_same_but_for_what_it_no_longer_clips(
    seed: int, size: int, headroom: int
) -> None:
    x = random(4, 64, seed=seed, size=2.0**size)
    amax = float(x.abs().amax())
    tight, wide = (nvfp4_input(x, torch.tensor([448 * 6 / (factor * amax)])) for factor in (1, headroom))
    assert torch.equal(tight, wide)
    beyond = nvfp4_input(x, torch.tensor([448 * 6 / (amax / 4)]))
    assert float(beyond.abs().amax()) == pytest.approx(amax / 4, rel=0.01) and not torch.equal(beyond, wide)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (3, 2, 5, 32)])
def test_inputs_of_any_shape_and_none_at_all_keep_their_shape(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.bfloat16)
    for rounded in (nvfp4_input(x, torch.tensor([2688.0])), fp8_input(x)):
        assert rounded.shape == x.shape and rounded.dtype == x.dtype and torch.equal(rounded, x)


@pytest.mark.parametrize("width", [128, 256, 200])
def test_fp8_input_is_what_a_plain_loop_gives(width: int) -> None:
    x = random(5, width, size=3.0)
    expected = torch.zeros(x.shape)
    for row, start in ((r, s) for r in range(5) for s in range(0, width, 128)):
        group = x[row, start : start + 128].float()
        scale = 2.0 ** math.ceil(math.log2(float(group.abs().max()) / 448))
        expected[row, start : start + 128] = (group / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(fp8_input(x), expected.to(x.dtype))


def test_fp8_input_of_the_grids_own_values_is_exact_up_to_the_largest() -> None:
    x = torch.tensor([448.0, -448.0, 1.0, 0.0] * 32, dtype=torch.bfloat16)[None]
    assert torch.equal(fp8_input(x), x)
    assert torch.equal(fp8_input(x * 2.0**-40), x * 2.0**-40)


def test_a_scheme_of_compressed_tensors_rounds_each_token_by_itself() -> None:
    rounding = quantizer(library_scheme("g", "int-quantized", INT8_BY_TOKEN), {}, None)
    x = random(7, 48) * torch.arange(1, 8)[:, None]
    assert rounding is not None
    found = rounding(x)
    assert torch.equal(found, torch.cat([rounding(token) for token in x.split(1)]))
    step = x.float().abs().amax(dim=1, keepdim=True) / 127
    assert (((found - x).float().abs() / step).amax(dim=1) < 1.1).all() and not torch.equal(found, x)
    assert rounding(x[:0]).shape == (0, 48)


def test_weight_only_schemes_leave_inputs_alone() -> None:
    assert quantizer(closed_scheme("g", INT, 4, 128, False), {}, None) is None
    assert quantizer(closed_scheme("g", NVFP4, 4, 16, False), {}, None) is None


# ------------------------------------------------------------------------------------------------ weights


def test_fp8_weights_under_powers_of_two_are_taken_as_they_are() -> None:
    stored = fp8(random(200, 300), pow2=True)
    blocks = stored["weight_scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    expected = stored["weight"].float() * blocks
    assert torch.equal(kernel_weight(closed_scheme("g", FP8, 8, None, True), stored).float(), expected)


def test_fp8_weights_under_other_scales_are_rounded_anew_as_the_consumer_does_at_load() -> None:
    weight = random(128, 128)
    stored = fp8(weight)
    values = stored["weight"].float() * stored["weight_scale"].float()
    scale = 2.0 ** math.ceil(math.log2(float(values.abs().max()) / 448))
    expected = (values / scale).to(torch.float8_e4m3fn).float() * scale
    found = kernel_weight(closed_scheme("g", FP8, 8, None, True), stored).float()
    assert torch.equal(found, expected) and not torch.equal(found, values.bfloat16().float())


def test_integers_are_decoded_to_their_multiples_of_the_scale() -> None:
    weight = random(16, 64)
    stored = int4(weight)
    found = kernel_weight(closed_scheme("g", INT, 4, 32, False), stored).float()
    scale = stored["weight_scale"].float().repeat_interleave(32, dim=1)
    assert (found - weight.float()).abs().max() <= 0.55 * scale.max()
    assert torch.equal((found / scale).round().mul(scale).bfloat16().float(), found)


def test_a_scheme_of_compressed_tensors_is_decoded_by_it() -> None:
    scale = torch.rand(8, 1) + 0.5
    stored = {"weight": torch.randint(-127, 127, (8, 48)).to(torch.int8), "weight_scale": scale}
    found = kernel_weight(library_scheme("g", "int-quantized", INT8_BY_TOKEN), stored)
    assert torch.equal(found, (stored["weight"].float() * scale).bfloat16())


# ------------------------------------------------------------------------------------------------ linears in a model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulate")
    write_toy(folder / "source")
    run(toy_job(folder, make=False))
    return folder / "out"


def in_memory(artifact: Path, block: str = "layers.1") -> Side:
    side = open_side("artifact", artifact, torch.device("cpu"))
    for piece in side.pieces(block):
        side.install(piece, piece.load())
    side.emulate_inputs(block)
    return side


@torch.no_grad()
def test_an_expert_is_a_linear_of_rounded_inputs_and_decoded_weight(artifact: Path) -> None:
    module, tensors, x = "layers.1.ffn.experts.2.w2", read(artifact), random(9, 128)
    packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"].float()
    signed = torch.cat([E2M1, -E2M1])
    values = torch.stack([signed[(packed & 15).long()], signed[(packed >> 4).long()]], dim=-1).flatten(1)
    weight = (values * (scale / tensors[f"{module}.weight_global_scale"]).repeat_interleave(16, dim=1)).bfloat16()
    divisor = min(float(t) for name, t in tensors.items() if name.startswith("layers.1.") and "w2.input_g" in name)
    expected = F.linear(plain_nvfp4(x, divisor), weight)
    found = in_memory(artifact).model.get_submodule("model.layers.1.mlp.experts.2.down_proj")(x)
    assert torch.equal(found, expected) and not torch.equal(found, F.linear(x, weight))


@torch.no_grad()
def test_an_attention_projection_is_a_linear_of_rounded_inputs_and_decoded_weight(artifact: Path) -> None:
    tensors, x = read(artifact), random(2, 5, 256)
    stored = {suffix: tensors[f"layers.1.attn.wkv.{suffix}"] for suffix in ("weight", "weight_scale")}
    weight = kernel_weight(closed_scheme("g", FP8, 8, None, True), stored)
    found = in_memory(artifact).model.get_submodule("model.layers.1.self_attn.kv_proj")(x)
    assert torch.equal(found, F.linear(fp8_input(x), weight)) and not torch.equal(found, F.linear(x, weight))


def test_experts_of_a_layer_run_under_the_widest_input_range_of_them_all(artifact: Path, tmp_path: Path) -> None:
    wide = {f"layers.1.ffn.experts.7.{p}.input_global_scale": torch.tensor([0.001]) for p in ("w1", "w3")}
    x = random(3, 256)

    def outputs(folder: Path) -> list[Tensor]:
        experts = in_memory(folder).model.model.layers[1].mlp.experts
        return [experts[0].gate_proj(x), experts[0].up_proj(x), experts[0].down_proj(x[:, :128])]

    (w1, w3, w2), (other_w1, other_w3, other_w2) = outputs(artifact), outputs(changed(artifact, tmp_path / "a", wide))
    assert not torch.equal(w1, other_w1) and not torch.equal(w3, other_w3) and torch.equal(w2, other_w2)


@torch.no_grad()
@pytest.mark.parametrize("block", ["layers.0", "layers.1", "mtp.0"])
def test_experts_over_all_tokens_at_once_are_the_separate_linears_bit_for_bit(artifact: Path, block: str) -> None:
    side = in_memory(artifact, block)
    experts = side.model.get_submodule({"mtp.0": "mtp.0"}.get(block, f"model.{block}") + ".mlp.experts")
    generator = torch.Generator().manual_seed(3)
    x, shares = random(50, 256), torch.rand(50, 2, generator=generator).to(torch.bfloat16)
    chosen = torch.randint(
        0, 7, (50, 2), generator=generator
    )  # expert 7 gets nothing, and some tokens one expert twice
    assert bool((chosen[:, 0] == chosen[:, 1]).any())
    at_once = experts.forward
    assert isinstance(at_once, RoundedExperts)
    one_by_one = type(experts).forward(experts, x, chosen, shares)
    assert torch.equal(at_once(x, chosen, shares).view(torch.int16), one_by_one.view(torch.int16))
    side.release(block)
    assert "forward" not in vars(experts)


def test_released_linears_round_nothing_any_more(artifact: Path) -> None:
    side = in_memory(artifact)
    hooked = [m for m in side.model.modules() if m._forward_pre_hooks]
    side.release("layers.1")
    assert len(hooked) == 5 + 3 * 8
    assert not any(m._forward_pre_hooks for m in side.model.modules())
    assert all(p.is_meta for p in side.model.parameters())


def test_fused_projections_share_an_input_scale() -> None:
    specs = [s for s in source_tensors(Dims.from_config(ToyConfig().as_config_json())) if s.is_quantizable]
    groups = {shares_input_scale(s) for s in specs if s.block == "layers.0"}
    attention = {f"layers.0.attn.{p}" for p in ("wq_b", "wo_a", "wo_b")}
    assert groups == {"experts w1, w3", "experts w2", "wq_a, wkv"} | attention
