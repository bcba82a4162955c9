"""Weights to quantized bytes and back, as pure tensor maths: any device, batched, no module, no file.

Every encoder takes the scales as given and rounds; choosing scales is the observers' business. The bytes equal those of
compressed-tensors' own compressors (0.17 and 0.19), which work module by module; here a whole layer's experts
are one call. Letters: M rows (out), N columns (in), `...` any leading dimensions (experts).

NVFP4 (`nvfp4-pack-quantized`): E2M1 values {0, .5, 1, 1.5, 2, 3, 4, 6} with a sign, one E4M3 scale per 16 columns,
one F32 global scale per linear, which is a divisor: value = q * block_scale / global_scale. Two values per byte, the
even column in the low nibble; nibble = sign << 3 | index. The quotient is F32.

FP8 blocks (`float-quantized`): E4M3 values, one scale per 128x128 block, value = q * block_scale. Blocks at the edge
are smaller.

Integers (`pack-quantized`, symmetric, per group of columns): value = q * scale; q + 2^(bits-1) is stored as unsigned,
32/bits values per I32, first column in the lowest bits. The bytes are laid out for little-endian machines.

FP8 and integers divide in the promoted dtype of weight and scale, as compressed-tensors does: BF16 by BF16 is rounded
to BF16 before it is rounded to the grid. With a power-of-two scale that rounding changes nothing.

Not here: asymmetric zero points, per-channel and per-tensor scales; they go through compressed-tensors itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4q.formats.dtypes import e2m1_pairs

NVFP4_GROUP = 16
FP8_BLOCK = 128
E2M1_MAX = 6.0
TILE = 1 << 18
"""Elements that a CPU works on at once: some twenty passes go over them, and their temporaries fit its cache."""
E4M3_MAX = 448.0
WINDOW = (-9, 8)
"""Exponents of the powers of two that E4M3 has."""


@torch.no_grad()
def nvfp4_encode(
    weight: Tensor, block_scale: Tensor, global_scale: Tensor, *, keep_negative_zero: bool = False
) -> Tensor:
    """Round a weight to E2M1 under given scales and pack it.

    Args:
        weight: BF16, F16 or F32 [..., M, N], N a multiple of 16.
        block_scale: E4M3 values, as F8_E4M3 or any wider float, [..., M, N/16], positive.
        global_scale: F32 divisor, one element, or one per leading index ([...] or [..., 1]).
        keep_negative_zero: store -0.0 as -0, so that weights on the grid come back bit for bit. compressed-tensors
            does not (`cast_to_fp4`): there only what is strictly negative after scaling has the sign bit.

    Returns:
        U8 [..., M, N/2]. Ties go to the even index; a small negative value is stored as -0. NaN becomes 0.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check_groups(weight, block_scale, NVFP4_GROUP)
    scaled = torch.unflatten(weight, -1, (-1, NVFP4_GROUP)) / nvfp4_scale(block_scale, global_scale).unsqueeze(-1)
    codes = _e2m1_codes(scaled, torch.signbit(scaled) if keep_negative_zero else scaled < 0).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2].bitwise_left_shift_(4)


@torch.no_grad()
def nvfp4_decode(packed: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """F32 values [..., M, N] of U8 `packed` [..., M, N/2]; scales as in `nvfp4_encode`. -0 keeps its sign."""
    pairs = e2m1_pairs(torch.float32, packed.device).index_select(0, packed.flatten().to(torch.int32))
    values = pairs.view(*packed.shape[:-1], packed.shape[-1] * 2 // NVFP4_GROUP, NVFP4_GROUP)
    _check_groups(values.flatten(-2), block_scale, NVFP4_GROUP)
    return values.mul_(nvfp4_scale(block_scale, global_scale).unsqueeze(-1)).flatten(-2)


@torch.no_grad()
def nvfp4_scale(block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """What one E2M1 unit is worth: block_scale / global_scale, F32 [..., M, N/16], rounded once."""
    if global_scale.numel() != 1:
        if global_scale.numel() != block_scale.shape[:-2].numel():
            raise ValueError(f"global scale {tuple(global_scale.shape)} does not fit {tuple(block_scale.shape)}")
        global_scale = global_scale.reshape(*block_scale.shape[:-2], 1, 1)
    else:
        global_scale = global_scale.reshape(1)
    return block_scale.to(torch.float32) / global_scale.to(torch.float32)


def _e2m1_codes(scaled: Tensor, negative: Tensor) -> Tensor:
    """Nibbles as U8, one per element, the sign bit where `negative`.

    Consumes `scaled` (F32): it is changed in place to save its size in memory.

    The index is the number of decision points passed. A point that is a tie belongs to the even index: 0.25 to 0 and
    1.25 to 2, so those are strict; 0.75 to 2 and 1.75 to 4, so those are not.
    """
    magnitude = scaled.abs_()
    codes = negative.view(torch.uint8).bitwise_left_shift_(3)
    codes += magnitude > 0.25
    codes += magnitude >= 0.75
    codes += magnitude > 1.25
    codes += magnitude >= 1.75
    codes += magnitude > 2.5
    codes += magnitude >= 3.5
    codes += magnitude > 5.0
    return codes


@torch.no_grad()
def fp8_block_encode(weight: Tensor, block_scale: Tensor) -> Tensor:
    """Round a weight to E4M3 under given 128x128 block scales.

    Args:
        weight: float [..., M, N].
        block_scale: float multiplier [..., ceil(M/128), ceil(N/128)], positive.

    Returns:
        F8_E4M3 [..., M, N], ties to even, clipped at 448. -0.0 keeps its sign.

    Raises:
        ValueError: shapes do not fit together.
    """
    blocks = _blocks(weight, block_scale) / block_scale[..., :, None, :, None]
    return _unblocked(blocks.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), weight)


@torch.no_grad()
def fp8_block_decode(quantized: Tensor, block_scale: Tensor) -> Tensor:
    """F32 values [..., M, N] of F8_E4M3 `quantized` [..., M, N]; scales as in `fp8_block_encode`."""
    values = quantized.to(torch.float32)
    return _unblocked(_blocks(values, block_scale) * block_scale.to(torch.float32)[..., :, None, :, None], quantized)


def _blocks(weight: Tensor, block_scale: Tensor) -> Tensor:
    """View [..., M/128, 128, N/128, 128], zero padded at ragged edges."""
    rows, columns = (-(-n // FP8_BLOCK) for n in weight.shape[-2:])
    if tuple(block_scale.shape) != (*weight.shape[:-2], rows, columns):
        raise ValueError(f"block scale {tuple(block_scale.shape)} does not fit {tuple(weight.shape)}")
    ragged = (0, columns * FP8_BLOCK - weight.shape[-1], 0, rows * FP8_BLOCK - weight.shape[-2])
    if any(ragged):
        weight = pad(weight, ragged)
    return torch.unflatten(torch.unflatten(weight, -1, (columns, FP8_BLOCK)), -3, (rows, FP8_BLOCK))


def _unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_blocks`: the padding is dropped."""
    whole = blocks.flatten(-2).flatten(-3, -2)
    return whole[..., : like.shape[-2], : like.shape[-1]].contiguous()


@torch.no_grad()
def int_group_encode(weight: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """Round a weight to symmetric integers under given group scales and pack it.

    Args:
        weight: float [..., M, N], N a multiple of `group`.
        scale: float multiplier [..., M, N/group], positive.
        bits: 4 or 8.
        group: columns that share one scale.

    Returns:
        I32 [..., M, ceil(N * bits / 32)], the last word filled with zero bits. Ties to even, clipped to
        [-2^(bits-1), 2^(bits-1) - 1].

    Raises:
        ValueError: shapes do not fit together, or `bits` is not 4 or 8.
    """
    offset = _offset(bits)
    _check_groups(weight, scale, group)
    scaled = torch.unflatten(weight, -1, (-1, group)) / scale.unsqueeze(-1)
    scaled.clamp_(-offset, offset - 1).round_()
    unsigned = (scaled.flatten(-2).add_(offset)).to(torch.uint8)  # at most 255: exact in BF16 too
    missing = -unsigned.shape[-1] % (32 // bits)
    if missing:
        unsigned = pad(unsigned, (0, missing))
    if bits == 4:
        unsigned = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    return unsigned.view(torch.int32)


@torch.no_grad()
def int_group_decode(packed: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """F32 values [..., M, N] of I32 `packed`, N = scale.shape[-1] * group; scales as in `int_group_encode`."""
    _offset(bits)
    columns = scale.shape[-1] * group
    there = packed.shape[-1] * (32 // bits)
    if there - columns not in range(32 // bits):
        raise ValueError(f"{there} packed columns do not fit {columns}")
    values = torch.unflatten(unpacked_integers(packed, bits, columns), -1, (-1, group))
    return values.mul_(scale.to(torch.float32).unsqueeze(-1)).flatten(-2)


@torch.no_grad()
def unpacked_integers(words: Tensor, bits: int, count: int) -> Tensor:
    """F32 [..., count]: signed integers of 1 to 8 bits, packed densely into I32 [..., W], the first in the lowest bits.

    -2^(bits-1) is stored as 0.
    """
    if bits in (4, 8):
        unsigned = words.contiguous().view(torch.uint8)
        if bits == 4:
            unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(-2)
        return unsigned[..., :count].to(torch.float32).sub_(1 << (bits - 1))
    wide = pad(words.to(torch.int64).bitwise_and_(0xFFFFFFFF), (0, 1))
    bit = torch.arange(count, device=words.device) * bits
    low, offset = wide.index_select(-1, bit // 32), bit % 32
    both = (low >> offset) | (wide.index_select(-1, bit // 32 + 1) << (32 - offset))
    return both.bitwise_and_((1 << bits) - 1).to(torch.float32).sub_(1 << (bits - 1))


def _offset(bits: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"integers of {bits} bits are not packed here")
    return 1 << (bits - 1)


def _check_groups(weight: Tensor, scale: Tensor, group: int) -> None:
    """A scale of another shape could broadcast and give wrong bytes in silence."""
    if tuple(scale.shape) != (*weight.shape[:-1], weight.shape[-1] // group) or weight.shape[-1] % group:
        raise ValueError(
            f"scale {tuple(scale.shape)} does not fit weight {tuple(weight.shape)} in groups of {group} columns"
        )
