"""DeepSeek's own weight formats to BF16, exactly or not at all: pure tensor maths, any device.

E8M0 (OCP Microscaling Formats 1.0): a byte b stands for 2^(b - 127); 0xFF is NaN.
MXFP4 (same document): E2M1 values 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign, code = sign << 3 | index, two in a byte with
the even column in the low nibble; one E8M0 scale for every 32 columns of a row. value = q * scale.
FP8 blocks: E4M3 values, one scale for every 128x128 block, blocks at the edge smaller. value = q * scale. The scale is
E8M0, or F32 in the Base release (https://github.com/NVIDIA-NeMo/Automodel/issues/2034); then it has to be a power of
two.

A value has at most 4 significant bits, so BF16, with its 8, holds it unless its exponent is out of reach. Exponents
prove that for a whole tensor at once; only a tensor with a scale near the ends of the range is compared bit for bit.
-0 stays -0.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from dsv4q.errors import WeightError
from dsv4q.formats.dtypes import e2m1_pairs
from dsv4q.formats.encode import FP8_BLOCK, TILE
from dsv4q.formats.kernels import cpu_kernels, in_bands, mxfp4_decode, on_threads

MXFP4_GROUP = 32
E8M0_BIAS = 127
E8M0_NAN = 0xFF

_SAFE_MXFP4 = (0, 125 + E8M0_BIAS)
"""E8M0 codes under which every E2M1 value is a BF16 number: multiples of 2^-128 up to 1.5 * 2^127."""
_SAFE_FP8 = (-124 + E8M0_BIAS, 119 + E8M0_BIAS)
"""The same for E4M3, whose values are multiples of 2^-9 up to 1.75 * 2^8; BF16's are multiples of 2^-133."""
_TOGETHER = {"cpu": TILE, "cuda": 1 << 27}
"""Elements that are decoded at once: their temporaries fit a CPU's cache, and are some hundred MB on a GPU."""
_AGAIN = "get this shard again; what is finished so far is kept, and the same command resumes"


@torch.no_grad()
def mxfp4_to_bf16(packed: Tensor, scale: Tensor, where: str = "") -> Tensor:
    """Dequantize MXFP4.

    Args:
        packed: U8 or I8 [..., M, N/2].
        scale: E8M0 as F8_E8M0 or U8 [..., M, ceil(N/32)].
        where: names the tensor in errors.

    Returns:
        BF16 [..., M, N].

    Raises:
        ValueError: shapes or dtypes do not fit together.
        WeightError: a NaN scale; a value that BF16 does not hold.
    """
    columns = packed.shape[-1] * 2
    _check(scale, (*packed.shape[:-1], -(-columns // MXFP4_GROUP)))
    _refuse_nan_scale(_e8m0_codes(scale), where)
    return _decoded(packed, scale, columns, where)


def _mxfp4_factors(packed: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 values and powers of two, both BF16 [..., M, N]."""
    columns = packed.shape[-1] * 2
    # A pair moves as one I32; in memory its low half is first, so on little-endian machines only.
    both = e2m1_pairs(torch.bfloat16, packed.device).view(torch.int32).flatten()
    pairs = both.index_select(0, packed.view(torch.uint8).flatten().to(torch.int32))
    values = pairs.view(torch.bfloat16).view(*packed.shape[:-1], columns)
    return values, _spread(codes, MXFP4_GROUP, columns)


@torch.no_grad()
def fp8_to_bf16(weight: Tensor, scale: Tensor, where: str = "") -> Tensor:
    """Dequantize FP8 blocks.

    Args:
        weight: F8_E4M3 [..., M, N].
        scale: E8M0 as F8_E8M0 or U8, or F32 powers of two, [..., ceil(M/128), ceil(N/128)].
        where: names the tensor in errors.

    Returns:
        BF16 [..., M, N].

    Raises:
        ValueError: shapes or dtypes do not fit together.
        WeightError: a NaN value or scale; an F32 scale that is no power of two; a value that BF16 does not hold.
    """
    rows, columns = weight.shape[-2:]
    _check(scale, (*weight.shape[:-2], -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)))
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"FP8 weights are F8_E4M3, not {weight.dtype}")
    _refuse_if(_is_nan(weight), "A source tensor has NaN or Inf", "E4M3 values without NaN (0x7F or 0xFF)", where)
    if scale.dtype == torch.float32:
        what = "A scale is not a power of two, so BF16 cannot hold the weights exactly"
        _refuse_if(_is_no_power_of_two(scale), what, "powers of two", where)
    else:
        _refuse_nan_scale(_e8m0_codes(scale), where)
    return _decoded(weight, scale, columns, where)


def _fp8_factors(weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and powers of two, both BF16 [..., M, N]."""
    rows, columns = weight.shape[-2:]
    wide = _spread(codes, FP8_BLOCK, columns)
    if weight.is_cuda:
        values = weight.to(torch.bfloat16)
    else:  # PyTorch converts E4M3 on a CPU one element at a time
        values = _e4m3_table().index_select(0, weight.view(torch.uint8).flatten().to(torch.int32)).view(weight.shape)
    return values, wide.repeat_interleave(FP8_BLOCK, dim=-2)[..., :rows, :]


@cache
def _e4m3_table() -> Tensor:
    """BF16 [256]: the value of every code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)


@torch.no_grad()
def decode_into(weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """Dequantize T weights without a look at whether BF16 holds them, which `doubtful` tells; waits for no device.

    Args:
        weight: [T, M, N/2] or [T, M, N], as `mxfp4_to_bf16` and `fp8_to_bf16` take them; its dtype says which.
        scale: [T, ...] as there.
        out: BF16 [T, M, N], contiguous, receives what those give.
    """
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    if not is_fp8 and mxfp4_decode(weight, scale, out):
        return
    factors, height = (_fp8_factors, FP8_BLOCK) if is_fp8 else (_mxfp4_factors, 1)
    codes, together = _codes(scale), _TOGETHER[out.device.type]
    if not out.is_cuda and cpu_kernels() is not None:
        _decode_compiled(weight, codes, out)
        return
    step = max(1, together // max(1, out[0].numel()))
    if out[0].numel() <= together:
        for parts in zip(weight.split(step), codes.split(step), out.split(step), strict=True):
            torch.mul(*factors(*parts[:2]), out=parts[2])
        return
    rows = max(1, together // (out.shape[-1] * height))
    for one, under, there in zip(weight, codes, out, strict=True):
        for parts in zip(one.split(rows * height), under.split(rows), there.split(rows * height), strict=True):
            torch.mul(*factors(*parts[:2]), out=parts[2])


def _decode_compiled(weight: Tensor, codes: Tensor, out: Tensor) -> None:
    """By our kernels, rows on as many threads as torch has."""
    kernels = cpu_kernels()
    assert kernels is not None
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    values = _bf16_bits(is_fp8)
    decode, height = (kernels.fp8_decode, FP8_BLOCK) if is_fp8 else (kernels.mxfp4_decode, 1)
    pieces = (
        (packed, under, values, to)
        for whole in zip(weight.view(torch.uint8), codes, out.view(torch.uint16), strict=True)
        for packed, under, to in in_bands(whole, (1, height, 1))
    )
    on_threads(decode, pieces)


@cache
def _bf16_bits(is_fp8: bool) -> Tensor:
    """U16 [256, 256] or [256, 16]: BF16's bits of every E4M3 or E2M1 code under every E8M0 code."""
    under = _spread(torch.arange(256, dtype=torch.uint8)[:, None], 1, 1)
    values = _e4m3_table() if is_fp8 else e2m1_pairs(torch.bfloat16, torch.device("cpu"))[:16, 0]
    return (values * under).view(torch.uint16).contiguous()


@torch.no_grad()
def doubtful(weight: Tensor, scale: Tensor, largest: float = math.inf) -> Tensor:
    """Which of T weights need a closer look, as far as exponents tell; Bool [T].

    None of the others holds what BF16 does not, which `mxfp4_to_bf16` and `fp8_to_bf16` refuse, or a magnitude above
    `largest`, or nothing but zeros. Arguments as of `decode_into`; of MXFP4 it waits for the device, if `largest` is
    finite.
    """
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    codes, (low, high) = _codes(scale), _SAFE_FP8 if is_fp8 else _SAFE_MXFP4
    bad = ((codes < low) | (codes > high)).flatten(1).any(dim=1)
    if math.isfinite(largest):  # E4M3 stays below 2^9, E2M1 below 2^3
        loud = codes > E8M0_BIAS + math.floor(math.log2(largest)) - (9 if is_fp8 else 3)
        bad |= loud.flatten(1).any(dim=1) if is_fp8 else _any_loud(weight, loud)
    if scale.dtype == torch.float32:
        bad |= _is_no_power_of_two(scale).flatten(1).any(dim=1)
    if is_fp8:
        bad |= torch.stack([_is_nan(one).any() for one in weight])
    first_row = weight[:, 0].contiguous().view(torch.uint8)
    return bad | ((first_row & (0x7F if is_fp8 else 0x77)) == 0).all(dim=1)


def _any_loud(packed: Tensor, loud: Tensor) -> Tensor:
    """Which of T weights have a value other than zero in one of the `loud` groups: a group of zeros may have any scale.

    Args:
        packed: U8 or I8 [T, M, N/2].
        loud: BOOL [T, M, ceil(N/32)].
    """
    found = loud.flatten(1).any(dim=1)
    if packed.shape[-1] * 2 % MXFP4_GROUP:
        return found
    # As a rule there are none. To look at all values instead of waiting for that took a GPU 30 ms a layer.
    for at in found.nonzero().flatten().tolist():
        values = packed[at].view(torch.uint8) & 0x77
        there = values.unflatten(-1, (-1, MXFP4_GROUP // 2)).amax(dim=-1) > 0
        found[at] = (there & loud[at]).any()
    return found


def _check(scale: Tensor, shape: tuple[int, ...]) -> None:
    """A scale of another shape could broadcast and give wrong values in silence."""
    if tuple(scale.shape) != shape:
        raise ValueError(f"the scale has shape {list(scale.shape)}, not {list(shape)}")


def _codes(scale: Tensor) -> Tensor:
    return _f32_codes(scale) if scale.dtype == torch.float32 else _e8m0_codes(scale)


def _e8m0_codes(scale: Tensor) -> Tensor:
    if scale.dtype not in (torch.float8_e8m0fnu, torch.uint8):
        raise ValueError(f"E8M0 scales are F8_E8M0 or U8, not {scale.dtype}")
    return scale.view(torch.uint8)


def _f32_codes(scale: Tensor) -> Tensor:
    """The E8M0 code of each F32 power of two: its exponent field."""
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def _is_no_power_of_two(scale: Tensor) -> Tensor:
    bits = scale.contiguous().view(torch.int32)
    return (bits & 0x7FFFFF != 0) | (bits < 1 << 23) | (bits >= E8M0_NAN << 23)


def _is_nan(weight: Tensor) -> Tensor:
    return weight.view(torch.uint8).bitwise_and(0x7F) == 0x7F


def _refuse_nan_scale(codes: Tensor, where: str) -> None:
    _refuse_if(codes == E8M0_NAN, "A scale is NaN", "E8M0 scales without 0xFF", where)


def _spread(codes: Tensor, group: int, columns: int) -> Tensor:
    """BF16 [..., columns]: 2^(code - 127), each for `group` columns."""
    # The code is BF16's exponent field too, but for 0: 2^-127 is a subnormal.
    bits = (codes.to(torch.int16) << 7).masked_fill_(codes == 0, 0x0040)
    return bits.view(torch.bfloat16).repeat_interleave(group, dim=-1)[..., :columns]


def _decoded(weight: Tensor, scale: Tensor, columns: int, where: str) -> Tensor:
    """BF16 [..., M, N]; the scales are numbers."""
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    codes, (low, high) = _codes(scale), _SAFE_FP8 if is_fp8 else _SAFE_MXFP4
    if not codes.numel() or (int(codes.min()) >= low and int(codes.max()) <= high):
        result = torch.empty(*weight.shape[:-1], columns, dtype=torch.bfloat16, device=weight.device)
        decode_into(*(whole.reshape(-1, *whole.shape[-2:]) for whole in (weight, scale, result)))
        return result
    values, factors = (_fp8_factors if is_fp8 else _mxfp4_factors)(weight, codes)
    result = values * factors
    true = values.to(torch.float32) * factors.to(torch.float32)
    lost = ~true.isfinite() | (result.to(torch.float32) != true)
    _refuse_if(lost, "A dequantized value is not a BF16 number", "values that BF16 holds exactly", where)
    return result


def _refuse_if(bad: Tensor, what: str, expected: str, where: str) -> None:
    if bool(bad.any()):
        first = [int(i) for i in bad.nonzero()[0]]
        found = f"{int(bad.sum()):,} of {bad.numel():,} are not, the first at {first}"
        raise WeightError(what, where=where or None, expected=expected, found=found, hint=_AGAIN)
