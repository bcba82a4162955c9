"""Native weights against stored ones without widening either: codes are compared with codes, exponents with exponents.

Where two codes have scales that are powers of two, their values are equal exactly if one code is the other one doubled
as often as its scale is smaller. Doubling is exact and has one result or none, so nothing is rounded here, and what is
called equal decodes to equal bits, -0 included. What is not shown equal may still be: it is compared as numbers then.

Letters: T linears, M rows, N columns. Sources: OCP Microscaling Formats 1.0 (E2M1, E8M0), OCP FP8 1.0 (E4M3).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4q.formats.kernels import cpu_kernels

GROUPS = 1 << 16
"""Groups of 16 columns that a CPU compares at once: half a megabyte of codes."""
CODES, CODES_ON_GPU = 1 << 18, 1 << 24
"""E4M3 codes that are compared at once."""
_MAGNITUDES, _ONES = 0x7777777777777777, 0x1111111111111111
"""Of the 16 nibbles in a word: all bits but the signs; the lowest bits."""
_DOUBLINGS = 3
"""0.5 can be doubled so often before it leaves E2M1, 6 not once."""
_E4M3_DOUBLINGS = 18
"""Doublings after which of E4M3 nothing but zeros is left."""
_REACH = (3, 246)
"""E8M0 codes under which every E2M1 and E4M3 value is a normal number of BF16, or one of its subnormals."""
_NONE = 1 << 12
"""Stands for an exponent where a scale has none that is of use; further from every exponent than these from another."""


@torch.no_grad()
def equal_mxfp4(packed: Tensor, scale: Tensor, stored: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """Which MXFP4 linears are shown to be equal to their NVFP4 form.

    Args:
        packed: U8 or I8 [T, M, N/2] of the source.
        scale: E8M0 as F8_E8M0 or U8 [T, M, ceil(N/32)].
        stored: U8 [T, M, N/2] of the artifact.
        block_scale: F8_E4M3 [T, M, N/16].
        global_scale: F32 [T, 1], a divisor.

    Returns:
        Bool [T]; true implies that every stored scale is positive and finite.
    """
    if not packed.is_cuda and cpu_kernels() is not None:
        return _equal_mxfp4_compiled(packed, scale, stored, block_scale, global_scale)
    count, _, groups = block_scale.shape
    fine, base = _divisors(global_scale)
    source = _looked_up(_exponents_of_e8m0(scale.device), scale).add_(base.view(count, 1, 1))
    source = source.unsqueeze(-1).expand(*source.shape, 2).flatten(-2)[..., :groups]
    shift = (source - _looked_up(_exponents_of_e4m3(scale.device), block_scale)).reshape(count, -1)
    mine, yours = (codes.view(torch.int64).reshape(count, -1) for codes in (packed, stored))
    step = shift.shape[1] if shift.is_cuda else GROUPS
    for parts in zip(*(torch.split(whole, step, dim=1) for whole in (mine, yours, shift)), strict=True):
        fine &= _equal_words(*parts)
    return fine


def _equal_mxfp4_compiled(
    packed: Tensor, scale: Tensor, stored: Tensor, block_scale: Tensor, global_scale: Tensor
) -> Tensor:
    """The same by a kernel, which lets go of the interpreter."""
    kernels = cpu_kernels()
    assert kernels is not None
    fine, base = _divisors(global_scale)
    mine, yours = (codes.view(torch.uint8).numpy().view(np.uint64) for codes in (packed, stored))
    under, over = (codes.view(torch.uint8).numpy() for codes in (scale, block_scale))
    exponents = _exponents_for(kernels.NOTHING)
    for linear in fine.nonzero().flatten().tolist():
        parts = mine[linear], yours[linear], under[linear], over[linear]
        fine[linear] = kernels.equal_words(*parts, exponents, int(base[linear]), _REACH)
    return fine


@cache
def _exponents_for(nothing: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """I64 [256]: `_exponents_of_e4m3` with the kernels' own mark for none."""
    exponents = _exponents_of_e4m3(torch.device("cpu")).to(torch.int64)
    return exponents.masked_fill_(exponents == _NONE, nothing).numpy()


@cache
def _exponents_of_e4m3(device: torch.device) -> Tensor:
    """I16 [256]: the exponent of every E4M3 code that is a positive power of two, of others `_NONE`."""
    mantissa, exponent = torch.frexp(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
    return (exponent - 1).masked_fill_(mantissa != 0.5, _NONE).to(torch.int16).to(device)


@cache
def _exponents_of_e8m0(device: torch.device) -> Tensor:
    """I16 [256]: every E8M0 code as it is, or `-_NONE` where it is out of reach."""
    code = torch.arange(256, dtype=torch.int16)
    return code.masked_fill_((code < _REACH[0]) | (code > _REACH[1]), -_NONE).to(device)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """Of each code [...], of one byte, what a table [256] has for it."""
    return table.index_select(0, codes.view(torch.uint8).flatten().to(torch.int32)).view(codes.shape)


def _divisors(global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [T]: which global scales [T, 1] are powers of two under which every E4M3 power is a normal F32.

    With it I16 [T]: what to add to an E8M0 code for its exponent under them.
    """
    bits = global_scale.reshape(-1).view(torch.int32)
    fine = _is_power_of_two(bits) & (bits >> 23 >= 8) & (bits >> 23 <= 244)
    return fine, (bits >> 23).to(torch.int16) - 254


def _equal_words(mine: Tensor, yours: Tensor, shift: Tensor) -> Tensor:
    """Which rows of words [T, n], I64 of 16 nibbles, are equal.

    Units of `yours` are 2^-shift of those of `mine`; a shift that is out of all reach belongs to a scale that is none.
    """
    fine = torch.ones(len(mine), dtype=torch.bool, device=mine.device)
    odd = (mine != yours) | (shift != 0)
    if not bool(odd.any()):
        return fine
    place = odd.flatten().nonzero().flatten()
    left = shift.flatten().index_select(0, place)
    one, other = (words.flatten().index_select(0, place) for words in (mine, yours))
    low, high = torch.where(left < 0, other, one), torch.where(left < 0, one, other)
    left = left.abs_()
    wrong = left > _NONE // 2  # zeros too want scales that are scales
    left.masked_fill_(low & _MAGNITUDES == 0, 0)
    wrong |= left > _DOUBLINGS
    for done in range(_DOUBLINGS):
        magnitude = low & _MAGNITUDES
        # The codes 0 to 7 are worth 0, .5, 1, 1.5, 2, 3, 4, 6: from 1 on doubling adds 2 to the code, at .5 it adds 1.
        from_one = (magnitude >> 1 | magnitude >> 2) & _ONES
        doubled = magnitude + (from_one << 1) + (magnitude & ~from_one & _ONES) | low & ~_MAGNITUDES
        due = left > done
        wrong |= due & (magnitude >> 1 & magnitude >> 2 & _ONES != 0)
        low = torch.where(due, doubled, low)
    wrong |= low != high
    fine[place[wrong] // shift.shape[1]] = False
    return fine


@torch.no_grad()
def equal_fp8(weight: Tensor, scale: Tensor, stored: Tensor, block_scale: Tensor) -> Tensor:
    """Which native FP8 linears are shown to be equal to their stored form.

    Args:
        weight: F8_E4M3 [T, M, N] of the source.
        scale: E8M0 as F8_E8M0 or U8, or F32, [T, ceil(M/128), ceil(N/128)].
        stored: F8_E4M3 [T, M, N] of the artifact.
        block_scale: BF16 or F32 as `scale`, a multiplier.

    Returns:
        Bool [T]; true implies that every stored scale is positive and finite.
    """
    theirs = block_scale.to(torch.float32).contiguous().view(torch.int32)
    fine = _is_power_of_two(theirs).flatten(1).all(dim=1)
    if scale.dtype == torch.float32:
        bits = scale.contiguous().view(torch.int32)
        fine &= _is_power_of_two(bits).flatten(1).all(dim=1)
        source = bits >> 23
    else:
        source = scale.view(torch.uint8).to(torch.int32)
    fine &= ((source >= _REACH[0]) & (source <= _REACH[1])).flatten(1).all(dim=1)
    mine, yours = weight.view(torch.uint8), stored.view(torch.uint8)
    shift = (source - (theirs >> 23)).clamp(-_E4M3_DOUBLINGS, _E4M3_DOUBLINGS)
    kernels = None if weight.is_cuda else cpu_kernels()
    if kernels is not None:
        table, times = _doubled_e4m3(weight.device).numpy(), shift.to(torch.int64).numpy()
        for linear in fine.nonzero().flatten().tolist():
            fine[linear] = kernels.equal_blocks(mine[linear].numpy(), yours[linear].numpy(), times[linear], table)
        return fine
    for linear in range(len(fine)):
        fine[linear] &= _equal_blocks(mine[linear], yours[linear], shift[linear])
    return fine


def _equal_blocks(mine: Tensor, yours: Tensor, shift: Tensor) -> Tensor:
    """Whether codes [M, N] (U8) are equal and no NaN, Bool []; 128x128 of `yours` have units 2^-shift of `mine`'s."""
    doubled = _doubled_e4m3(mine.device).flatten()
    rows, columns = mine.shape
    step = max(1, (CODES_ON_GPU if mine.is_cuda else CODES) // columns // 128) * 128
    fine = torch.ones((), dtype=torch.bool, device=mine.device)
    for start in range(0, rows, step):
        one, other = (codes[start : start + step].to(torch.int32) for codes in (mine, yours))
        times = shift[start // 128 : (start + step) // 128].repeat_interleave(128, 0)[: len(one)]
        times = times.repeat_interleave(128, 1)[:, :columns]
        low, high = torch.where(times < 0, other, one), torch.where(times < 0, one, other)
        fine &= (doubled.index_select(0, (times.abs() * 256 + low).flatten()) == high.flatten()).all()
    return fine


@cache
def _doubled_e4m3(device: torch.device) -> Tensor:
    """I16 [1 + doublings, 256]: the code of each code's value, doubled so often; -1 where there is none, and of NaN."""
    table = torch.arange(256, dtype=torch.int16)
    table[[0x7F, 0xFF]] = -1
    tables = [table]
    for _ in range(_E4M3_DOUBLINGS):
        magnitude = tables[-1] & 0x7F
        # Subnormals, codes below 8, are multiples of one step, as are the codes up to 16 above them.
        double = torch.where(magnitude < 8, magnitude * 2, magnitude + 8)
        lost = (tables[-1] < 0) | (double >= 0x7F)
        tables.append((double | tables[-1] & 0x80).masked_fill(lost, -1))
    return torch.stack(tables).to(device)


def _is_power_of_two(bits: Tensor) -> Tensor:
    """Of F32 bits, whether they are a positive normal 2^k."""
    return (bits & 0x7FFFFF == 0) & (bits > 0) & (bits < 0x7F800000)
