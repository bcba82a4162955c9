"""Triton kernels for NVIDIA GPUs, each the twin of eager code and bit-equal to it; import only through `kernels.py`.

What keeps the bits equal: divisions are IEEE (`div_rn`), products and sums are not fused (`enable_fp_fusion=False`),
BF16 is rounded where eager code stores it, and exp is CUDA's own (libdevice), as in PyTorch's SiLU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

NONE = 1 << 20
"""Stands for "no bound" among exponents, as in `exact.py`."""
_GRID_BLOCK = 256
_ENCODE_BLOCK = 128
_DECODE_BLOCK = 128


def grid(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`exact.nvfp4_grid` of a contiguous BF16 weight [..., M, N]: lower, upper (I32), amax (F32), each [..., M, N/16].

    The fourth tensor is I32 [1], above zero if there are subnormals, for which the others are not valid.
    """
    shape = (*weight.shape[:-1], weight.shape[-1] // 16)
    lower, upper, amax = (torch.empty(shape, dtype=torch.int32, device=weight.device) for _ in range(3))
    odd = torch.zeros(1, dtype=torch.int32, device=weight.device)
    groups = lower.numel()
    with _on(weight.device):
        _grid[(triton.cdiv(groups, _GRID_BLOCK),)](
            weight.view(torch.int16), lower, upper, amax, odd, groups, LIMIT=NONE, BLOCK=_GRID_BLOCK
        )
    return lower, upper, amax.view(torch.float32), odd


@triton.jit
def _grid(weight, lower, upper, amax, odd, groups, LIMIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < groups
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    bits = tl.load(weight + at, mask=inside[:, None], other=0).to(tl.int32) & 0x7FFF
    largest = tl.max(bits, axis=1)
    smallest = tl.min(tl.where(bits == 0, 0x7FFF, bits), axis=1)
    off = tl.max(bits & 0x3F, axis=1) > 0
    exponent = tl.min(tl.where(bits == 0, 0x7FFF, (bits >> 7) - ((bits >> 6) & 1)), axis=1)
    zeros = largest == 0
    low = tl.where(zeros, -LIMIT, (largest >> 7) - 129)
    high = tl.where(off, -2 * LIMIT, tl.where(zeros, LIMIT, exponent - 126))
    tl.store(lower + row, low, mask=inside)
    tl.store(upper + row, high, mask=inside)
    tl.store(amax + row, largest << 16, mask=inside)
    if tl.min(smallest, axis=0) < 0x80:
        tl.atomic_max(odd, 1)


def nvfp4_exact(weight: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`exact.nvfp4_scales` and `encode.nvfp4_encode` of weights all of whose blocks are on the grid, in two passes.

    Args:
        weight: as that of `kernels.nvfp4_exact`, which says what is returned; contiguous.
        low, high: exponents of the smallest and the largest power of two that E4M3 has.
    """
    count, shared = weight.shape[:2]
    packed, scale = (
        torch.empty((*weight.shape[:-1], weight.shape[-1] // n), dtype=torch.uint8, device=weight.device)
        for n in (2, 16)
    )
    groups = weight[0, 0].numel() // 16
    parts = triton.cdiv(groups, _ENCODE_BLOCK)
    squares = torch.empty((count, shared, parts), dtype=torch.float64, device=weight.device)
    top, failed = (torch.zeros(count, dtype=torch.int32, device=weight.device) for _ in range(2))
    bits = weight.view(torch.int16)
    with _on(weight.device):
        _top[(triton.cdiv(groups * shared, _GRID_BLOCK), count)](bits, top, failed, groups * shared, BLOCK=_GRID_BLOCK)
        # `top` counts from 1, the exponent field of the smallest number: 0 stands for zeros alone.
        exponent = torch.where(top == 0, 0, high + 129 - top).clamp_(-126, 127).to(torch.int32)
        _exact[(parts, count * shared)](
            bits, exponent, packed, scale, squares, failed, groups, parts, shared,
            LOW=low, HIGH=high, BLOCK=_ENCODE_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, scale, exponent, squares.sum(dim=-1), failed


@triton.jit
def _top(bits, top, failed, groups, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tensor = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < groups
    at = (tensor * groups + row)[:, None] * 16 + tl.arange(0, 16)[None, :]
    size = tl.load(bits + at, mask=inside[:, None], other=0).to(tl.int32) & 0x7FFF
    off = ((size & 0x3F) > 0) | ((size > 0) & (size < 0x80)) | (size >= 0x7F80)
    tl.atomic_max(top + tensor, tl.max(tl.max(size >> 7, axis=1), axis=0))
    if tl.max(tl.max(off.to(tl.int32), axis=1), axis=0) > 0:
        tl.atomic_max(failed + tensor, 1)


@triton.jit
def _exact(  # type: ignore[no-untyped-def]
    bits, exponents, packed, scale, squares, failed, groups, parts, shared,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    tensor = tl.program_id(1).to(tl.int64)
    row = part * BLOCK + tl.arange(0, BLOCK)
    inside = row < groups
    group = tensor * groups + row
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    value = tl.load(bits + at, mask=inside[:, None], other=0).to(tl.int32)
    size = value & 0x7FFF
    field, half = size >> 7, (size >> 6) & 1
    largest = tl.max(field, axis=1)
    zeros = largest == 0
    exponent = tl.load(exponents + tensor // shared)
    k = tl.maximum(largest - 129, LOW - exponent)
    upper = tl.min(tl.where(size == 0, 0x7FFF, field - half), axis=1) - 126
    fits = (k <= tl.minimum(upper, HIGH - exponent)) | zeros
    if tl.min(tl.where(fits | (row >= groups), 1, 0), axis=0) == 0:
        tl.atomic_max(failed + tensor // shared, 1)
    place = tl.where(zeros, 0, k + exponent)
    stored = tl.where(place >= -6, (place + 7) << 3, 1 << tl.maximum(place + 9, 0))
    tl.store(scale + group, stored.to(tl.uint8), mask=inside)

    binade = field - 127 - k[:, None]
    index = tl.where(size == 0, 0, tl.where(binade < 0, 1, 2 * binade + 2 + half))
    code = (index & 7) | ((value >> 12) & 8)
    first, second = tl.split(tl.reshape(code, (BLOCK, 8, 2)))
    to = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(packed + to, (first | (second << 4)).to(tl.uint8), mask=inside[:, None])

    number = (value << 16).to(tl.float32, bitcast=True)
    square = tl.sum(tl.sum((number * number).to(tl.float64), axis=1), axis=0)
    tl.store(squares + tensor * parts + part, square)


def nvfp4_encode_measured(
    weight: Tensor, block_scale: Tensor, global_scale: Tensor, keep_negative_zero: bool
) -> tuple[Tensor, Tensor]:
    """`encode.nvfp4_encode` and the sums of `compare.error_sums` of what it stores, in one pass.

    Args:
        weight: BF16 [T, M, N], contiguous.
        block_scale: F32 [T, M, N/16].
        global_scale: F32 [T].

    Returns:
        U8 [T, M, N/2] and F64 [T, 4].
    """
    tensors, groups = weight.shape[0], weight[0].numel() // 16
    parts = triton.cdiv(groups, _ENCODE_BLOCK)
    packed = torch.empty(*weight.shape[:-1], weight.shape[-1] // 2, dtype=torch.uint8, device=weight.device)
    sums = torch.empty(tensors, parts, 4, dtype=torch.float64, device=weight.device)
    with _on(weight.device):
        _encode[(parts, tensors)](
            weight, block_scale, global_scale, packed, sums, groups, parts,
            KEEP=keep_negative_zero, BLOCK=_ENCODE_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    total = torch.cat([sums[..., :3].sum(dim=1), sums[..., 3].amax(dim=1, keepdim=True)], dim=1)
    total[:, 0] /= weight[0].numel()
    return packed, total


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    weight, block_scale, global_scale, packed, sums, groups, parts, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    part = tl.program_id(0)
    tensor = tl.program_id(1).to(tl.int64)
    row = part * BLOCK + tl.arange(0, BLOCK)
    inside = row < groups
    group = tensor * groups + row
    scale = tl.load(block_scale + group, mask=inside, other=1.0)
    unit = tl.div_rn(scale, tl.load(global_scale + tensor) + tl.zeros_like(scale))[:, None]
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    source = tl.load(weight + at, mask=inside[:, None], other=0.0).to(tl.float32)
    unit = unit + tl.zeros_like(source)
    scaled = tl.div_rn(source, unit)
    signs = scaled.to(tl.int32, bitcast=True) < 0
    negative = ((scaled < 0) if not KEEP else signs).to(tl.int32)
    size = tl.abs(scaled)
    index = (
        (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
        + (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
        + (size > 5.0).to(tl.int32)
    )  # fmt: skip
    code = index | (negative << 3)
    low, high = tl.split(tl.reshape(code, (BLOCK, 8, 2)))
    to = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(packed + to, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])

    number = index.to(tl.float32)
    value = tl.where(index < 4, number * 0.5, tl.where(index < 6, number - 2.0, tl.where(index == 6, 4.0, 6.0)))
    value = (value.to(tl.int32, bitcast=True) | (negative << 31)).to(tl.float32, bitcast=True)
    stored = value * unit
    same = (stored.to(tl.int32, bitcast=True) == source.to(tl.int32, bitcast=True)) & inside[:, None]
    difference = stored - source
    to = sums + (tensor * parts + part) * 4
    tl.store(to, tl.sum(tl.sum(same.to(tl.int32), axis=1), axis=0).to(tl.float64))
    tl.store(to + 1, tl.sum(tl.sum((difference * difference).to(tl.float64), axis=1), axis=0))
    tl.store(to + 2, tl.sum(tl.sum((source * source).to(tl.float64), axis=1), axis=0))
    tl.store(to + 3, tl.max(tl.max(tl.abs(difference), axis=1), axis=0).to(tl.float64))


def mxfp4_decode(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """`native.decode_into` of MXFP4: U8 [..., M, N/2] and U8 [..., M, N/32] into BF16 [..., M, N]; all contiguous."""
    groups = scale.numel()
    with _on(out.device):
        _decode[(triton.cdiv(groups, _DECODE_BLOCK),)](
            packed, scale, out, groups, BLOCK=_DECODE_BLOCK, enable_fp_fusion=False
        )


@triton.jit
def _decode(packed, scale, out, groups, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < groups
    exponent = tl.load(scale + row, mask=inside, other=0).to(tl.int32)
    # BF16's exponent field is E8M0's code, but for 0: 2^-127 is a subnormal.
    factor = (tl.where(exponent == 0, 0x0040, exponent << 7) << 16).to(tl.float32, bitcast=True)[:, None]
    pair = tl.load(packed + row[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    code = tl.reshape(tl.join(pair & 15, pair >> 4), (BLOCK, 32))
    index = code & 7
    number = index.to(tl.float32)
    value = tl.where(index < 4, number * 0.5, tl.where(index < 6, number - 2.0, tl.where(index == 6, 4.0, 6.0)))
    value = (value.to(tl.int32, bitcast=True) | ((code >> 3) << 31)).to(tl.float32, bitcast=True)
    to = out + row[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(to, (value * factor).to(tl.bfloat16), mask=inside[:, None])


def swiglu(gate: Tensor, up: Tensor, limit: float, ends: Tensor, block: int) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) into `gate`, both BF16 and contiguous; returns `gate`.

    Args:
        ends: as those of `kernels.swiglu`.
        block: elements of the result of which each place of `ends` has the ends.
    """
    count = gate.numel()
    parts = triton.cdiv(count, block)
    assert ends.is_contiguous() and ends.shape[1] >= parts, f"ends {list(ends.shape)} for {count} elements"
    with _on(gate.device):
        _swiglu[(parts,)](gate, up, ends, limit, count, ends.shape[1], BLOCK=block, num_warps=8, enable_fp_fusion=False)
    return gate


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Context in which kernels start on a device; to enter torch's own costs as much as to start one."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@triton.jit
def _swiglu(gate, up, ends, limit, count, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0)
    at = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    u = tl.minimum(tl.maximum(u, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL)
    silu = tl.div_rn(g, libdevice.exp(g * -1.0) + 1.0).to(tl.bfloat16)
    hidden = (silu.to(tl.float32) * u).to(tl.bfloat16)
    tl.store(gate + at, hidden, mask=inside)
    number = hidden.to(tl.float32)
    bad = tl.sum(((number != number) & inside).to(tl.int32), axis=0) > 0
    low = tl.min(tl.where(inside, number, float("inf")), axis=0)
    high = tl.max(tl.where(inside, number, float("-inf")), axis=0)
    tl.store(ends + part, tl.where(bad, float("nan"), low))
    tl.store(ends + width + part, tl.where(bad, float("nan"), high))
