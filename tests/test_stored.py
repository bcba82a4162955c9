"""Stored linears to numbers, whole and by rows, one and several; errors counted at once, alone and in pieces."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4q.formats.compare import Comparison, error_sums, tensor_error
from dsv4q.formats.dtypes import E2M1_VALUES, e2m1_pairs, torch_dtypes
from dsv4q.formats.encode import (
    fp8_block_encode,
    int_group_decode,
    int_group_encode,
    nvfp4_encode,
    unpacked_integers,
)
from dsv4q.formats.error import Errors
from dsv4q.formats.exact import fp8_block_scales, nvfp4_scales
from dsv4q.formats.stored import FP8_BLOCKS, NVFP4, StoredForm, StoredRows, decode, packed_integers
from dsv4q.layout import DTYPE_BYTES

SHAPE = (160, 256)


def weights(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


def nvfp4() -> dict[str, torch.Tensor]:
    scales = nvfp4_scales(weights().unsqueeze(1))
    block, divisor = scales.block_scale[:, 0].to(torch.float8_e4m3fn), scales.global_scale
    packed = nvfp4_encode(weights(), block, divisor, keep_negative_zero=True)
    return {"weight_packed": packed, "weight_scale": block, "weight_global_scale": divisor}


def fp8() -> dict[str, torch.Tensor]:
    scale = fp8_block_scales(weights())
    return {"weight": fp8_block_encode(weights(), scale), "weight_scale": scale.to(torch.bfloat16)}


def integers(bits: int, group: int) -> dict[str, torch.Tensor]:
    scale = (weights().unflatten(-1, (-1, group)).abs().amax(-1) / 2 ** (bits - 1)).to(torch.bfloat16)
    return {"weight_packed": int_group_encode(weights(), scale, bits, group), "weight_scale": scale}


CASES = {
    "NVFP4": (NVFP4, nvfp4()),
    "FP8 by blocks": (FP8_BLOCKS, fp8()),
    "INT4": (packed_integers(4, 64), integers(4, 64)),
    "INT8": (packed_integers(8, 128), integers(8, 128)),
    "INT4 by rows": (packed_integers(4, None), integers(4, 256)),
}


@pytest.mark.parametrize("case", CASES)
def test_several_linears_decode_as_each_by_itself(case: str) -> None:
    form, stored = CASES[case]
    together = decode(form, stored)
    assert together.shape == (3, *SHAPE) and together.dtype == torch.float32
    for index in range(3):
        assert torch.equal(decode(form, {name: value[index] for name, value in stored.items()}), together[index])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("height", [128, 256])
def test_rows_are_those_of_the_whole_bit_for_bit(case: str, height: int) -> None:
    form, stored = CASES[case]
    one = {name: value[1] for name, value in stored.items()}
    rows = StoredRows(form, one)
    assert rows.shape == SHAPE and height % rows.step == 0
    pieces = [rows.rows(begin, min(begin + height, SHAPE[0])) for begin in range(0, SHAPE[0], height)]
    assert torch.equal(torch.cat(pieces).view(torch.int32), decode(form, one).view(torch.int32))


def test_a_form_without_an_encoder_of_ours_decodes_by_its_rows() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    scale = torch.full((4, 4), 128, dtype=torch.uint8)  # 2^1
    found = decode(StoredForm("e2m1", (1, 32), "scale"), {"weight": codes, "scale": scale})
    assert torch.equal(found, 2 * e2m1_pairs(torch.float32, codes.device)[codes.long()].flatten(-2))


def test_a_zero_point_is_taken_off_before_the_scale() -> None:
    form, stored = packed_integers(4, 64), {n: value[0] for n, value in integers(4, 64).items()}
    shifted = decode(form, {**stored, "weight_zero_point": torch.full((160, 4), 3, dtype=torch.int8)})
    units = stored["weight_scale"].float().repeat_interleave(64, dim=1)
    codes = unpacked_integers(stored["weight_packed"], 4, 256)
    assert torch.equal(shifted, (codes - 3) * units)


def test_scales_of_another_shape_are_refused() -> None:
    form, stored = CASES["NVFP4"]
    with pytest.raises(ValueError, match="does not fit"):
        decode(form, {**stored, "weight_scale": stored["weight_scale"][:, :, 1:]})


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_every_width_come_out_as_they_were_packed(bits: int) -> None:
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 37), generator=torch.Generator().manual_seed(bits))
    stream = [0] * (-(-37 * bits // 32) * 32)
    rows = []
    for row in values.tolist():
        bit_of = [(value + 2 ** (bits - 1)) >> k & 1 for value in row for k in range(bits)]
        filled = bit_of + stream[len(bit_of) :]
        words = [sum(bit << k for k, bit in enumerate(filled[i : i + 32])) for i in range(0, len(filled), 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    assert torch.equal(unpacked_integers(torch.tensor(rows, dtype=torch.int32), bits, 37), values.float())


def test_a_width_that_does_not_fit_the_words_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        int_group_decode(torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 1), 4, 64)


def test_the_table_of_pairs_is_e2m1_low_nibble_first() -> None:
    pairs = e2m1_pairs(torch.bfloat16, torch.device("cpu"))
    assert pairs[0x72].tolist() == [E2M1_VALUES[2], E2M1_VALUES[7]]
    assert math.copysign(1, float(pairs[0x08][0])) == -1


def test_every_safetensors_dtype_has_the_size_that_the_layout_says() -> None:
    assert {name: dtype.itemsize for name, dtype in torch_dtypes().items()} == DTYPE_BYTES


# ------------------------------------------------------------------------------------------------ errors


def test_one_tensor_and_pieces_of_it_have_the_same_error() -> None:
    weight = weights()[0].float()
    stored = decode(*CASES["FP8 by blocks"])[0]
    whole, pieces = tensor_error(weight, stored), Comparison()
    for begin in range(0, SHAPE[0], 32):
        pieces.add(weight[begin : begin + 32], stored[begin : begin + 32])
    found = pieces.error
    assert 0 < whole.exact_fraction == found.exact_fraction < 1
    assert whole.max_abs_error == found.max_abs_error
    assert whole.relative == pytest.approx(found.relative, rel=1e-5)


def test_a_lost_sign_of_zero_is_no_error_but_not_exact() -> None:
    weight, stored = torch.tensor([[0.0, -0.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.0, 1.0, 2.0]])
    pieces = Comparison()
    pieces.add(weight, stored)
    for error in (tensor_error(weight, stored), pieces.error):
        assert (error.exact_fraction, error.relative, error.max_abs_error) == (0.75, 0.0, 0.0)


def test_errors_of_a_class_add_up_whoever_counted_them() -> None:
    stored = decode(*CASES["INT4"])
    sums = error_sums(weights(), stored)
    together, first, second = Errors(), Errors(), Errors()
    together.add_all(["a", "b", "c"], sums.tolist())
    first.add_all(["a"], sums[:1].tolist())
    second.add_all(["b", "c"], sums[1:].tolist())
    first.merge(second)
    assert first.as_dict() == together.as_dict()
    assert together.tensors == 3 and together.worst == max(error.relative for error in together.each.values())


def test_an_error_of_a_weight_of_zeros_is_infinite() -> None:
    errors = Errors()
    errors.add("a", tensor_error(torch.zeros(2, 2), torch.ones(2, 2)))
    assert errors.relative == errors.worst == math.inf
