"""Scales that lose nothing on the grid, and are the best ones off it."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.modifiers.quantization.calibration import initialize_observer
from llmcompressor.observers import Observer
from llmcompressor.observers.helpers import fuse_weight_observers
from torch import Tensor, nn

from dsv4q.formats.encode import fp8_block_decode, fp8_block_encode, nvfp4_decode, nvfp4_encode
from dsv4q.formats.exact import fp8_block_scales, nvfp4_grid, nvfp4_scales, round_e2m1
from dsv4q.run.observers import ExactFp8BlockObserver, ExactNvfp4Observer, settle_nvfp4

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
NVFP4_SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights={"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
             "scale_dtype": "torch.float8_e4m3fn", "observer": "exact_nvfp4"},
    format="nvfp4-pack-quantized",
)  # fmt: skip
FP8_SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights={"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True,
             "observer": "exact_fp8_block"},
    format="float-quantized",
)  # fmt: skip


def mxfp4(generator: torch.Generator, rows: int, columns: int, low: int = -12, high: int = 0) -> Tensor:
    """BF16 weight [rows, columns] as a dequantized MXFP4 tensor has it: E2M1 times 2^e per 32, -0 included."""
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    exponents = torch.randint(low, high + 1, (rows, columns // 32), generator=generator)
    return (E2M1[codes] * (2.0**exponents).repeat_interleave(32, dim=1)).to(torch.bfloat16)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.to(torch.float32).view(torch.int32), right.to(torch.float32).view(torch.int32))


def nvfp4_round_trip(weight: Tensor) -> Tensor:
    """Encode and decode weights [T, P, M, N] under their exact scales."""
    found = nvfp4_scales(weight)
    shared = found.global_scale.expand(-1, weight.shape[1])
    packed = nvfp4_encode(weight, found.block_scale, shared, keep_negative_zero=True)
    return nvfp4_decode(packed, found.block_scale.to(torch.float8_e4m3fn), shared)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(-100, 90), st.integers(0, 17))
def test_every_tensor_from_mxfp4_within_the_window_comes_back_bit_for_bit(seed: int, low: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.stack([mxfp4(generator, 3, 64, low, low + width) for _ in range(2)])[None]
    assert same_bits(nvfp4_round_trip(weight), weight)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(18, 30))
def test_blocks_beyond_the_window_fall_back_and_the_others_stay_exact(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.cat([mxfp4(generator, 1, 32, 0, 0), mxfp4(generator, 1, 32, -width - 3, -width - 3)], dim=1)
    weight[0, 0], weight[0, 16], weight[0, 32:] = 6.0, 6.0, 0.5 * 2.0 ** (-width - 3)
    back = nvfp4_round_trip(weight[None, None])[0, 0]
    assert same_bits(back[:, :32], weight[:, :32])
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("edge", [17, 18])
def test_the_window_has_eighteen_binades(edge: int) -> None:
    weight = torch.full((1, 1, 1, 32), 6.0)
    weight[..., 16:] = 6.0 * 2.0**-edge
    weight[..., 17] = 0.5 * 2.0**-edge  # with 6 and 0.5 in one block there is a single exact exponent
    weight[..., 1] = 0.5
    found = nvfp4_scales(weight.to(torch.bfloat16))
    assert int(found.exact_blocks) == (2 if edge == 17 else 1)


def test_the_smallest_block_scale_used_is_a_subnormal_e4m3_and_exact() -> None:
    weight = torch.full((1, 1, 1, 32), 6.0)
    weight[..., 1], weight[..., 16:], weight[..., 17] = 0.5, 6.0 * 2.0**-17, 0.5 * 2.0**-17
    weight = weight.to(torch.bfloat16)
    assert float(nvfp4_scales(weight).block_scale.min()) == 2.0**-9
    assert same_bits(nvfp4_round_trip(weight), weight)


def test_a_wider_interval_is_used_where_the_smallest_exponent_is_outside_the_window() -> None:
    weight = torch.zeros((1, 1, 1, 32))
    weight[..., 0], weight[..., 1] = 6.0, 0.5
    weight[..., 16] = 4.0 * 2.0**-18  # alone it may be 4, 2, 1 or 0.5 times a power: up to three binades more
    found = nvfp4_scales(weight.to(torch.bfloat16))
    assert int(found.exact_blocks) == 2


def test_w1_and_w3_share_one_window() -> None:
    generator = torch.Generator().manual_seed(5)
    pair = torch.stack([mxfp4(generator, 4, 64, -4, 0), mxfp4(generator, 4, 64, -14, -10)])[None]
    found = nvfp4_scales(pair)
    assert found.global_scale.shape == (1, 1)
    assert found.exact_blocks.tolist() == [[16, 16]]
    assert same_bits(nvfp4_round_trip(pair), pair)


def test_all_zero_weights_get_positive_scales_and_keep_their_signs() -> None:
    weight = torch.zeros((2, 1, 2, 32), dtype=torch.bfloat16)
    weight[1] = -0.0
    found = nvfp4_scales(weight)
    assert (found.block_scale == 1).all() and (found.global_scale == 1).all()
    assert same_bits(nvfp4_round_trip(weight), weight)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
def test_the_interval_of_exact_exponents_is_the_true_one(values: list[float]) -> None:
    block = torch.tensor(values, dtype=torch.float32)
    grid = nvfp4_grid(block[None])
    codes = E2M1[:8].double()
    exact = [
        k
        for k in range(-40, 40)
        if all(bool((codes == abs(v) * 2.0**-k).any()) for v in block.double().tolist())
    ]  # fmt: skip
    lower, upper = int(grid.lower), int(grid.upper)
    inside = [k for k in range(-40, 40) if lower <= k <= upper]
    assert inside == exact


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=16, max_size=16), st.booleans())
def test_bits_of_bf16_give_the_same_grid_as_its_values(raw: list[int], on_grid: bool) -> None:
    bits = torch.tensor(raw, dtype=torch.int16)
    bits = (bits & ~0x3F) if on_grid else bits
    weight = torch.where((bits & 0x7F80) == 0x7F80, 0, bits).view(torch.bfloat16)[None]
    fast, slow = nvfp4_grid(weight), nvfp4_grid(weight.to(torch.float32))
    assert torch.equal(fast.lower, slow.lower)
    assert torch.equal(fast.upper, slow.upper)
    assert torch.equal(fast.amax, slow.amax)


def test_one_value_off_the_grid_is_noticed() -> None:
    weight = mxfp4(torch.Generator().manual_seed(1), 2, 64)
    weight[1, 40] = 1.0078125  # one bit of BF16 beside 1
    found = nvfp4_scales(weight[None, None])
    assert int(found.exact_blocks) == 7


def errors_of_both(weight: Tensor) -> tuple[float, float]:
    """Frobenius error under our scales and under those of llmcompressor's best search."""
    observer = Observer.load_from_registry(
        "nvfp4_expanded_mse", base_name="weight", args=NVFP4_SCHEME.weights.model_copy()
    )
    observer(weight)
    found = observer.get_qparams()
    packed = nvfp4_encode(weight, found["scale"], found["global_scale"])
    theirs = nvfp4_decode(packed, found["scale"], found["global_scale"])
    ours = nvfp4_round_trip(weight[None, None])[0, 0]
    return float((ours.double() - weight.double()).norm()), float((theirs.double() - weight.double()).norm())


@pytest.mark.parametrize("scale", [1e-30, 0.02, 1.0, 1e30])
def test_on_gaussian_weights_the_error_is_no_worse_than_that_of_expanded_mse(scale: float) -> None:
    torch.manual_seed(7)
    ours, theirs = errors_of_both((torch.randn(64, 256) * scale).to(torch.bfloat16))
    assert ours <= theirs


def test_on_heavy_tails_the_mean_error_is_no_worse_than_that_of_expanded_mse() -> None:
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        ours, theirs = errors_of_both(torch.distributions.StudentT(4.0).sample((64, 256)).to(torch.bfloat16))
        ratios.append(ours / theirs)
    assert sum(ratios) / len(ratios) <= 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(-110, 100))
def test_every_tensor_from_fp8_with_power_of_two_scales_comes_back_bit_for_bit(seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (130, 200), generator=generator, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0x80  # NaN becomes -0
    codes[:, :50] &= 0x87  # subnormals
    weight = (codes.view(torch.float8_e4m3fn).float() * 2.0**exponent).to(torch.bfloat16)
    scale = fp8_block_scales(weight)
    assert same_bits(fp8_block_decode(fp8_block_encode(weight, scale.to(torch.bfloat16)), scale), weight)


def test_fp8_off_the_grid_is_no_worse_than_min_max_after_the_consumers_requantization() -> None:
    torch.manual_seed(3)
    weight = (torch.randn(256, 384) * 0.02).to(torch.bfloat16)
    scale = fp8_block_scales(weight)
    ours = fp8_block_decode(fp8_block_encode(weight, scale), scale)
    minmax = weight.reshape(2, 128, 3, 128).abs().amax(dim=(1, 3)).float() / 448
    once = fp8_block_decode(fp8_block_encode(weight.float(), minmax), minmax)
    ue8m0 = 2.0 ** torch.ceil(torch.log2(minmax))
    twice = fp8_block_decode(fp8_block_encode(once, ue8m0), ue8m0)
    exact = weight.double()
    assert (ours.double() - exact).norm() <= (twice.double() - exact).norm()


def test_fp8_scales_are_the_smallest_powers_of_two_that_do_not_clip() -> None:
    for amax, power in ((448.0, 0), (449.0, 1), (224.0, -1), (225.0, 0), (1.0, -8)):
        weight = torch.zeros(128, 128)
        weight[3, 5] = -amax
        assert float(fp8_block_scales(weight)) == 2.0**power, amax


@settings(max_examples=100, deadline=None)
@given(st.floats(-20, 20, width=32))
def test_rounding_in_the_search_is_the_encoders(value: float) -> None:
    x = torch.full((1, 16), value)
    one = torch.ones(1, 1)
    assert torch.equal(round_e2m1(x), nvfp4_decode(nvfp4_encode(x, one, one[0]), one, one[0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.zeros(1, 1, 1, 16)
    weight[..., 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        nvfp4_scales(weight)
    with pytest.raises(ValueError, match="NaN or Inf"):
        fp8_block_scales(weight[0, 0])


# ------------------------------------------------------------------------------------------------ as observers


class Expert(nn.Module):
    """One expert with the names that llmcompressor fuses."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_proj", gate), ("up_proj", up)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.quantization_scheme = NVFP4_SCHEME.model_copy(deep=True)
            initialize_observer(linear, "weight")
            setattr(self, name, linear)
        fuse_weight_observers(self)


def qparams(linear: nn.Module) -> dict[str, Tensor]:
    linear.weight_observer(linear.weight)
    return linear.weight_observer.get_qparams()


def test_the_observer_settled_in_a_batch_gives_the_same_scales_as_module_by_module() -> None:
    generator = torch.Generator().manual_seed(11)
    weights = [
        (mxfp4(generator, 8, 64, -6, 0), torch.randn(8, 64, generator=generator).to(torch.bfloat16)),
        (mxfp4(generator, 8, 64, -3, 0), mxfp4(generator, 8, 64, -12, -9)),
    ]
    alone = [Expert(*pair) for pair in weights]
    batch = [Expert(*pair) for pair in weights]
    settle_nvfp4([(expert.gate_proj, expert.up_proj) for expert in batch])
    for one, other in zip(alone, batch, strict=True):
        for name in ("gate_proj", "up_proj"):
            left, right = qparams(getattr(one, name)), qparams(getattr(other, name))
            assert torch.equal(left["scale"], right["scale"])
            assert torch.equal(left["global_scale"], right["global_scale"])


def test_compressed_tensors_own_decompressor_returns_the_source() -> None:
    generator = torch.Generator().manual_seed(2)
    expert = Expert(mxfp4(generator, 8, 64), mxfp4(generator, 8, 64, -9, -3))
    for linear in (expert.gate_proj, expert.up_proj):
        params = qparams(linear)
        packed = nvfp4_encode(linear.weight, params["scale"], params["global_scale"], keep_negative_zero=True)
        state = {
            "weight_packed": packed,
            "weight_scale": params["scale"].to(torch.float8_e4m3fn),
            "weight_global_scale": params["global_scale"],
        }
        compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
        assert same_bits(compressor.decompress(state, NVFP4_SCHEME)["weight"], linear.weight)


def test_the_fp8_observer_gives_the_scales_of_the_closed_form() -> None:
    linear = nn.Linear(256, 200, bias=False)
    linear.weight = nn.Parameter(torch.randn(200, 256).to(torch.bfloat16), requires_grad=False)
    linear.quantization_scheme = FP8_SCHEME.model_copy(deep=True)
    initialize_observer(linear, "weight")
    assert torch.equal(qparams(linear)["scale"], fp8_block_scales(linear.weight))


@pytest.mark.parametrize(
    ("observer", "scheme"), [(ExactNvfp4Observer, FP8_SCHEME), (ExactFp8BlockObserver, NVFP4_SCHEME)]
)
def test_an_observer_refuses_the_other_format(observer: type[Observer], scheme: QuantizationScheme) -> None:
    with pytest.raises(ValueError, match="is for"):
        observer("weight", scheme.weights.model_copy())
