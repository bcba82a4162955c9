"""encode.py against compressed-tensors' own compressors, bit for bit, and against literal bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import FP8_BLOCK, NVFP4
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4q.formats.encode import (
    fp8_block_decode,
    fp8_block_encode,
    int_group_decode,
    int_group_encode,
    nvfp4_decode,
    nvfp4_encode,
)

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_FINITE = [b for b in range(256) if b & 0x7F != 0x7F]


def _gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)) * 0.02


def _heavy_tailed(*shape: int) -> Tensor:
    """Cauchy, clipped so that F32 and BF16 hold it."""
    return torch.tan((torch.rand(*shape, generator=torch.Generator().manual_seed(8)) - 0.5) * 3.14).mul(0.02)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def _minus_zeros(*shape: int) -> Tensor:
    return torch.where(torch.arange(shape[-1]) % 3 == 0, -0.0, _gaussian(*shape))


def _ties(*shape: int) -> Tensor:
    points = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(2)
    points = points * torch.tensor([1.0, -1.0]).repeat_interleave(8)
    return points.repeat(shape[-1] // 16 + 1)[: shape[-1]].expand(*shape).clone()


def _tiny(*shape: int) -> Tensor:
    return _gaussian(*shape) * 1e-38


def _wide(*shape: int) -> Tensor:
    """Blocks of very different sizes, so that small ones get subnormal or replaced E4M3 scales."""
    return _gaussian(*shape) * torch.logspace(0, -6, shape[-2]).unsqueeze(-1)


KINDS: list[Callable[..., Tensor]] = [_gaussian, _heavy_tailed, _zeros, _minus_zeros, _ties, _tiny, _wide]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__.strip("_"))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


def _nvfp4_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    args = QuantizationArgs(**dict(NVFP4["weights"]))
    global_scale = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
    groups = weight.unflatten(-1, (-1, 16))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale)
    return scale, global_scale


def _compress(compressor: type, scheme: dict, **state: Tensor) -> dict[str, Tensor]:
    return compressor.compress(state, QuantizationScheme(targets=["Linear"], **scheme))


@kinds
@dtypes
def test_nvfp4_bytes_equal_compressed_tensors(kind: Callable[..., Tensor], dtype: torch.dtype) -> None:
    weight = kind(24, 80).to(dtype)
    scale, global_scale = _nvfp4_scales(weight)
    theirs = _compress(
        NVFP4PackedCompressor, NVFP4, weight=weight, weight_scale=scale, weight_global_scale=global_scale
    )
    ours = nvfp4_encode(weight, theirs["weight_scale"], global_scale)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, theirs["weight_packed"])


@kinds
def test_nvfp4_values_equal_compressed_tensors(kind: Callable[..., Tensor]) -> None:
    weight = kind(24, 80).to(torch.bfloat16)
    scale, global_scale = _nvfp4_scales(weight)
    state = _compress(NVFP4PackedCompressor, NVFP4, weight=weight, weight_scale=scale, weight_global_scale=global_scale)
    theirs = NVFP4PackedCompressor.decompress(state, QuantizationScheme(targets=["Linear"], **NVFP4))["weight"]
    ours = nvfp4_decode(state["weight_packed"], state["weight_scale"], global_scale).to(torch.bfloat16)
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def _fp8_scale(weight: Tensor, power_of_two: bool) -> Tensor:
    args = QuantizationArgs(**dict(FP8_BLOCK["weights"]))
    rows, columns = (-(-n // 128) for n in weight.shape)
    padded = torch.nn.functional.pad(weight, (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0]))
    blocks = padded.unflatten(-1, (columns, 128)).unflatten(0, (rows, 128)).transpose(1, 2)
    scale, _ = calculate_qparams(blocks.amin((-1, -2)), blocks.amax((-1, -2)), args)
    return torch.exp2(torch.ceil(torch.log2(scale.float()))).to(scale.dtype) if power_of_two else scale


@kinds
@pytest.mark.parametrize("power_of_two", [False, True], ids=["minmax", "pow2"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=["scale-bf16", "scale-f32"])
@pytest.mark.parametrize("shape", [(128, 128), (100, 200), (257, 130), (3, 5)], ids=str)
def test_fp8_block_bytes_equal_compressed_tensors(
    kind: Callable[..., Tensor], power_of_two: bool, scale_dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = kind(*shape).to(torch.bfloat16)
    scale = _fp8_scale(weight, power_of_two).to(scale_dtype)
    theirs = _compress(FloatQuantizationCompressor, FP8_BLOCK, weight=weight, weight_scale=scale)["weight"]
    ours = fp8_block_encode(weight, scale)
    assert ours.dtype == torch.float8_e4m3fn
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("shape", [(128, 256), (100, 200)], ids=str)
def test_fp8_block_values_equal_compressed_tensors(shape: tuple[int, int]) -> None:
    weight = _minus_zeros(*shape).to(torch.bfloat16)
    state = {"weight_scale": _fp8_scale(weight, False)}
    state["weight"] = fp8_block_encode(weight, state["weight_scale"])
    scheme = QuantizationScheme(targets=["Linear"], **FP8_BLOCK)
    theirs = FloatQuantizationCompressor.decompress(state, scheme)["weight"]
    ours = fp8_block_decode(state["weight"], state["weight_scale"]).to(torch.bfloat16)
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def _int_scheme(bits: int, group: int) -> dict:
    return {"weights": QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=group)}


def _int_scale(weight: Tensor, bits: int, group: int) -> Tensor:
    groups = weight.unflatten(-1, (-1, group))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), _int_scheme(bits, group)["weights"])
    return scale


@kinds
@dtypes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group"), [(256, 128), (64, 32), (30, 10), (9, 3)], ids=str)
def test_integer_words_equal_compressed_tensors(
    kind: Callable[..., Tensor], dtype: torch.dtype, bits: int, columns: int, group: int
) -> None:
    weight = kind(12, columns).to(dtype)
    scale = _int_scale(weight, bits, group)
    scheme = _int_scheme(bits, group)
    theirs = _compress(PackedQuantizationCompressor, scheme, weight=weight, weight_scale=scale)["weight_packed"]
    ours = int_group_encode(weight, scale, bits, group)
    assert ours.dtype == torch.int32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_values_equal_compressed_tensors(bits: int) -> None:
    weight = _gaussian(12, 30).to(torch.bfloat16)
    scheme = _int_scheme(bits, 10)
    scale = _int_scale(weight, bits, 10)
    state = _compress(PackedQuantizationCompressor, scheme, weight=weight, weight_scale=scale)
    theirs = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], **scheme))["weight"]
    assert torch.equal(int_group_decode(state["weight_packed"], scale, bits, 10).to(torch.bfloat16), theirs)


def test_nvfp4_golden_bytes_even_column_in_low_nibble() -> None:
    weight = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.0]])
    packed = nvfp4_encode(weight, torch.ones(1, 1), torch.ones(1))
    assert bytes(packed.flatten().tolist()) == bytes.fromhex("1032 5476 a9cb ed0f".replace(" ", ""))


def test_nvfp4_global_scale_is_a_divisor() -> None:
    one = torch.full((1, 8), 0x22, dtype=torch.uint8)
    assert nvfp4_decode(one, torch.tensor([[3.0]]), torch.tensor([4.0])).tolist() == [[0.75] * 16]


def test_nvfp4_minus_zero_is_stored_as_plus_zero_and_small_negative_keeps_its_sign() -> None:
    weight = torch.tensor([[-0.0, -0.1] * 8])
    assert nvfp4_encode(weight, torch.ones(1, 1), torch.ones(1)).tolist() == [[0x80] * 8]


def test_nvfp4_clips_at_six() -> None:
    assert nvfp4_encode(torch.tensor([[7.0, -900.0] * 8]), torch.ones(1, 1), torch.ones(1)).tolist() == [[0xF7] * 8]


def test_fp8_golden_bytes() -> None:
    weight = torch.tensor([[0.0, -0.0, 2.0, -2.0, 2.0 * 448, 4e4, 2.0**-8, -(2.0**-8)]])
    packed = fp8_block_encode(weight, torch.full((1, 1), 2.0))
    assert packed.view(torch.uint8).tolist() == [[0x00, 0x80, 0x38, 0xB8, 0x7E, 0x7E, 0x01, 0x81]]


def test_int4_golden_word_first_column_in_lowest_bits() -> None:
    weight = torch.tensor([[-8.0, -7.0, 0.0, 7.0, 1.0, 2.0, 3.0, -1.0]])
    word = int_group_encode(weight, torch.ones(1, 1), bits=4, group=8)
    assert int(word) & 0xFFFFFFFF == 0x7BA9F810


def test_int8_golden_word_first_column_in_lowest_bits() -> None:
    word = int_group_encode(torch.tensor([[-128.0, 127.0, 0.0, 1.0]]), torch.ones(1, 1), bits=8, group=4)
    assert int(word) & 0xFFFFFFFF == 0x8180FF00


def test_a_batch_of_experts_equals_one_expert_at_a_time() -> None:
    weight = _gaussian(3, 8, 64).to(torch.bfloat16) * torch.tensor([1.0, 5.0, 0.01]).to(torch.bfloat16)[:, None, None]
    scales, globals_ = zip(*(_nvfp4_scales(w) for w in weight), strict=True)
    batch = nvfp4_encode(weight, torch.stack(scales), torch.stack(globals_))
    for i in range(3):
        assert torch.equal(batch[i], nvfp4_encode(weight[i], scales[i], globals_[i]))


def test_batched_fp8_and_integers_equal_one_at_a_time() -> None:
    weight = _gaussian(2, 130, 130).to(torch.bfloat16)
    fp8 = torch.stack([_fp8_scale(w, False) for w in weight])
    ints = torch.stack([_int_scale(w, 4, 10) for w in weight])
    assert torch.equal(
        fp8_block_encode(weight, fp8)[1].view(torch.uint8), fp8_block_encode(weight[1], fp8[1]).view(torch.uint8)
    )
    assert torch.equal(int_group_encode(weight, ints, 4, 10)[1], int_group_encode(weight[1], ints[1], 4, 10))


def test_encoders_leave_their_inputs_alone() -> None:
    weight = _gaussian(128, 128)
    kept = weight.clone()
    nvfp4_encode(weight, torch.ones(128, 8), torch.ones(1))
    fp8_block_encode(weight, torch.ones(1, 1))
    int_group_encode(weight, torch.ones(128, 1), 4, 128)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    "call",
    [
        lambda: nvfp4_encode(torch.ones(4, 32), torch.ones(4, 1), torch.ones(1)),
        lambda: nvfp4_encode(torch.ones(4, 24), torch.ones(4, 1), torch.ones(1)),
        lambda: nvfp4_encode(torch.ones(2, 4, 32), torch.ones(2, 4, 2), torch.ones(3)),
        lambda: nvfp4_decode(torch.ones(4, 16, dtype=torch.uint8), torch.ones(1, 2), torch.ones(1)),
        lambda: fp8_block_encode(torch.ones(4, 200), torch.ones(1, 1)),
        lambda: int_group_encode(torch.ones(4, 64), torch.ones(4, 1), 4, 32),
        lambda: int_group_encode(torch.ones(4, 64), torch.ones(4, 2), 3, 32),
        lambda: int_group_decode(torch.ones(4, 4, dtype=torch.int32), torch.ones(4, 2), 4, 32),
    ],
)  # fmt: skip
def test_a_scale_that_would_broadcast_is_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"fit|packed"):
        call()


@given(st.lists(st.integers(0, 15).filter(lambda n: n != 8), min_size=16, max_size=16), st.integers(-8, 8))
@settings(max_examples=60, deadline=None)
def test_nvfp4_values_on_the_grid_come_back_bit_for_bit(nibbles: list[int], exponent: int) -> None:
    packed = torch.tensor([[nibbles[i] | nibbles[i + 1] << 4 for i in range(0, 16, 2)]], dtype=torch.uint8)
    scale, global_scale = torch.tensor([[2.0**exponent]]).to(torch.float8_e4m3fn), torch.tensor([2.0**5])
    assert torch.equal(nvfp4_encode(nvfp4_decode(packed, scale, global_scale), scale, global_scale), packed)


@given(st.lists(st.sampled_from(E4M3_FINITE), min_size=1, max_size=40), st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_fp8_values_on_the_grid_come_back_bit_for_bit(codes: list[int], exponent: int) -> None:
    quantized = torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0**exponent]], dtype=torch.bfloat16)
    again = fp8_block_encode(fp8_block_decode(quantized, scale), scale)
    assert torch.equal(again.view(torch.uint8), quantized.view(torch.uint8))


@given(st.sampled_from([4, 8]), st.lists(st.integers(-128, 127), min_size=1, max_size=40), st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_integer_values_on_the_grid_come_back(bits: int, values: list[int], exponent: int) -> None:
    limit = 1 << (bits - 1)
    scale = torch.tensor([[2.0**exponent]])
    weight = torch.tensor([values], dtype=torch.float32).clamp(-limit, limit - 1) * scale
    packed = int_group_encode(weight, scale, bits, len(values))
    assert torch.equal(int_group_decode(packed, scale, bits, len(values)), weight)


@given(st.lists(st.floats(-7, 7, width=32), min_size=16, max_size=16))
@settings(max_examples=100, deadline=None)
def test_nvfp4_rounds_to_a_nearest_grid_value(values: list[float]) -> None:
    one = torch.ones(1, 1), torch.ones(1)
    decoded = nvfp4_decode(nvfp4_encode(torch.tensor([values]), *one), *one).flatten().tolist()
    for value, got in zip(values, decoded, strict=True):
        assert abs(abs(value) - abs(got)) == min(abs(abs(value) - g) for g in GRID)
        assert value * got >= 0
