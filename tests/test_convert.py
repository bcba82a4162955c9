"""Native weights to the artifact's formats on their bytes: what decoding and encoding give, bit for bit, or nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4q.errors import WeightError
from dsv4q.formats import convert
from dsv4q.formats.compare import error_sums
from dsv4q.formats.convert import Nvfp4, fp8_to_fp8_blocks, mxfp4_to_nvfp4
from dsv4q.formats.encode import fp8_block_decode, fp8_block_encode
from dsv4q.formats.exact import fp8_block_scales, nvfp4_scales
from dsv4q.formats.kernels import nvfp4_encode_measured
from dsv4q.formats.native import fp8_to_bf16, mxfp4_to_bf16


def ordinary_nvfp4(packed: Tensor, scale: Tensor) -> Nvfp4:
    """The same by way of BF16."""
    weight = mxfp4_to_bf16(packed, scale)
    found = nvfp4_scales(weight)
    shared = found.global_scale.expand(-1, weight.shape[1]).reshape(-1)
    bytes_, sums = nvfp4_encode_measured(
        weight.flatten(0, 1), found.block_scale.flatten(0, 1), shared, keep_negative_zero=True
    )
    blocks = weight.shape[2] * weight.shape[3] // 16
    return Nvfp4(
        (found.exact_blocks == blocks).all(dim=1),
        bytes_.view(packed.shape),
        found.block_scale.to(torch.float8_e4m3fn),
        found.global_scale,
        sums.view(*packed.shape[:2], 4),
    )


def assert_same(found: Nvfp4, true: Nvfp4, *, sums: bool = True) -> None:
    """Equal wherever the conversion claims a weight."""
    for one, other in (
        (found.packed, true.packed), (found.block_scale.view(torch.uint8), true.block_scale.view(torch.uint8)),
        (found.global_scale, true.global_scale), *([(found.sums, true.sums)] if sums else []),
    ):  # fmt: skip
        assert torch.equal(one[found.exact], other[found.exact])
    assert not (found.exact & ~true.exact).any()


def mxfp4(
    rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int, few: int = 16
) -> tuple[Tensor, Tensor]:
    """Random codes, of each block among a few, and E8M0 scales from `low` to `high`."""
    kinds = rng.integers(0, 16, (*shape[:-1], shape[-1] // 16, few))
    picked = np.take_along_axis(kinds, rng.integers(0, few, (*kinds.shape[:-1], 16)), axis=-1).reshape(shape)
    packed = torch.from_numpy((picked[..., 0::2] | picked[..., 1::2] << 4).astype(np.uint8))
    scale = torch.from_numpy(rng.integers(low, high + 1, (*shape[:-1], -(-shape[-1] // 32))).astype(np.uint8))
    return packed, scale


# ------------------------------------------------------------------------------------------------ MXFP4


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([(1, 1), (3, 1), (2, 2)]), st.integers(1, 5),
    st.sampled_from([16, 32, 48, 96]), st.integers(56, 160), st.integers(0, 22), st.sampled_from([1, 2, 3, 16]),
)  # fmt: skip
def test_any_weight_is_converted_as_by_way_of_bf16_or_left_to_it(
    seed: int, stack: tuple[int, int], rows: int, columns: int, low: int, width: int, few: int
) -> None:
    packed, scale = mxfp4(np.random.default_rng(seed), (*stack, rows, columns), low, low + width, few)
    found, true = mxfp4_to_nvfp4(packed, scale), ordinary_nvfp4(packed, scale)
    assert_same(found, true)
    assert torch.equal(found.exact, true.exact)


@pytest.mark.parametrize("code", range(256))
def test_every_code_under_every_scale_is_converted_as_by_way_of_bf16_or_left_to_it(code: int) -> None:
    """256 rows, each of one byte throughout, and the scales around `code` in the columns."""
    packed = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).repeat(1, 1, 1, 32)
    scale = torch.tensor([code, max(code - 1, 0)], dtype=torch.uint8).repeat(256, 1, 1, 1)
    found = mxfp4_to_nvfp4(packed, scale)
    if code == 255:
        assert not found.exact.any()
        return
    try:
        true = ordinary_nvfp4(packed, scale)
    except WeightError:
        fine = (packed & 0x77 == 0).all(dim=-1).flatten()
        assert not found.exact[~fine].any()
        return
    assert_same(found, true)
    assert bool(found.exact.all()) or not 55 <= code <= 188


@pytest.mark.parametrize("negative", [0, 8])
@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("second", range(8))
def test_a_block_may_hold_any_two_codes_at_either_end_of_the_window(first: int, second: int, negative: int) -> None:
    pair = torch.tensor([[first | (second | negative) << 4] * 8], dtype=torch.uint8)
    loud = torch.full((1, 16), 0x77, dtype=torch.uint8)
    for apart in range(12, 22):
        packed = torch.cat([loud, pair, pair], dim=1)[None, None]
        scale = torch.tensor([[127, 127 - apart]], dtype=torch.uint8)[None, None]
        found, true = mxfp4_to_nvfp4(packed, scale), ordinary_nvfp4(packed, scale)
        assert torch.equal(found.exact, true.exact), apart
        assert_same(found, true)


def test_a_weight_of_zeros_keeps_their_signs() -> None:
    packed = torch.tensor([[0x00, 0x80, 0x08, 0x88] * 4], dtype=torch.uint8)[None, None]
    scale = torch.tensor([[100]], dtype=torch.uint8)[None, None]
    found = mxfp4_to_nvfp4(packed, scale)
    assert torch.equal(found.packed, packed) and found.exact.all()
    assert_same(found, ordinary_nvfp4(packed, scale))


def test_w1_and_w3_share_the_global_scale_of_the_louder_one() -> None:
    packed = torch.full((1, 2, 1, 16), 0x77, dtype=torch.uint8)
    scale = torch.tensor([120, 124], dtype=torch.uint8).reshape(1, 2, 1, 1)
    found = mxfp4_to_nvfp4(packed, scale)
    assert found.block_scale.float().flatten().tolist() == [2.0**4] * 2 + [2.0**8] * 2
    assert_same(found, ordinary_nvfp4(packed, scale))


def test_a_weight_outside_the_window_leaves_the_others_alone() -> None:
    packed, scale = mxfp4(np.random.default_rng(0), (3, 2, 4, 64), 118, 122)
    whole = mxfp4_to_nvfp4(packed, scale)
    scale[1, 1, 2, 0] = 90
    found = mxfp4_to_nvfp4(packed, scale)
    assert whole.exact.tolist() == [True] * 3 and found.exact.tolist() == [True, False, True]
    assert_same(found, ordinary_nvfp4(packed, scale))


def test_tiles_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scale = mxfp4(np.random.default_rng(1), (9, 2, 7, 96), 110, 124)
    whole = mxfp4_to_nvfp4(packed, scale)
    monkeypatch.setattr(convert, "TILE", 5)
    with ThreadPoolExecutor(4) as pool:
        found = mxfp4_to_nvfp4(packed.view(torch.int8), scale.view(torch.float8_e8m0fnu), pool.map)
    assert_same(found, whole)
    assert found.exact.all()


def test_squares_too_far_apart_for_f64_are_rounded_once() -> None:
    packed = torch.full((1, 1, 1, 32), 0x77, dtype=torch.uint8)
    packed[..., 16:] = 0x11
    scale = torch.tensor([[[[140, 124]]]], dtype=torch.uint8)
    found, true = mxfp4_to_nvfp4(packed, scale), ordinary_nvfp4(packed, scale)
    assert_same(found, true, sums=False)
    torch.testing.assert_close(found.sums, true.sums, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("half", "scales"), [(12, 1), (16, 2), (40, 2)])
def test_shapes_that_do_not_fit_are_a_defect_of_the_caller(half: int, scales: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        mxfp4_to_nvfp4(torch.zeros(1, 1, 2, half, dtype=torch.uint8), torch.ones(1, 1, 2, scales, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------ FP8


def assert_as_ordinary(weight: Tensor, scale: Tensor, *, rounded_sum: float = 0.0) -> bool:
    """Whether it is converted, and then it is as by way of BF16, whose sum of squares may be off by `rounded_sum`."""
    found = fp8_to_fp8_blocks(weight, scale)
    if found is None:
        return False
    values = fp8_to_bf16(weight, scale)
    scales = fp8_block_scales(values)
    stored = fp8_block_encode(values, scales)
    assert torch.equal(found.weight.view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(found.block_scale, scales)
    true = error_sums(values[None], fp8_block_decode(stored, scales)[None])[0]
    torch.testing.assert_close(found.sums, true, rtol=rounded_sum, atol=0)
    return True


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300), st.integers(62, 170), st.integers(0, 12),
    st.integers(1, 126),
)  # fmt: skip
def test_any_fp8_weight_is_converted_as_by_way_of_bf16(
    seed: int, rows: int, columns: int, low: int, width: int, largest: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, largest + 1, (rows, columns)) | rng.integers(0, 2, (rows, columns)) << 7
    weight = torch.from_numpy(sizes.astype(np.uint8)).view(torch.float8_e4m3fn)
    blocks = (-(-rows // 128), -(-columns // 128))
    scale = torch.from_numpy(rng.integers(low, low + width + 1, blocks).astype(np.uint8))
    assert assert_as_ordinary(weight, scale.view(torch.float8_e8m0fnu), rounded_sum=1e-13)


@pytest.mark.parametrize("scale", range(256))
def test_every_fp8_code_is_converted_under_every_scale_as_by_way_of_bf16_or_left_to_it(scale: int) -> None:
    """A block for each code that is a number, in which it is the largest."""
    code = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    weight = torch.zeros(2, len(code), 128, dtype=torch.uint8)
    weight[0, :, 3], weight[1, :, 7] = code, code & 0x81
    scales = torch.full((1, len(code)), scale, dtype=torch.uint8)
    assert assert_as_ordinary(weight.flatten(1).view(torch.float8_e4m3fn), scales) == (62 <= scale <= 182)


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_an_fp8_weight_with_a_nan_is_left_to_the_ordinary_way_which_names_it(nan: int) -> None:
    weight = torch.zeros(200, 200, dtype=torch.uint8)
    weight[150, 10] = nan
    assert not assert_as_ordinary(weight.view(torch.float8_e4m3fn), torch.full((2, 2), 120, dtype=torch.uint8))


def test_fp8_blocks_of_a_release_keep_their_bytes() -> None:
    weight = torch.tensor([[0x7E, 0xFE, 0x01, 0x80]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = fp8_to_fp8_blocks(weight, torch.tensor([[120]], dtype=torch.uint8))
    assert found is not None and torch.equal(found.weight.view(torch.uint8), weight.view(torch.uint8))
    assert found.block_scale.tolist() == [[2.0**-7]]


def test_an_fp8_scale_that_does_not_fit_is_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fp8_to_fp8_blocks(torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.ones(1, 2, dtype=torch.uint8))
