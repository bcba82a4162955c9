"""Straight to the artifact's formats where nothing is rounded: of DeepSeek's own on a CPU, of BF16 on a GPU.

What comes out are the bytes that decoding to BF16, `exact.nvfp4_scales` and `kernels.nvfp4_encode_measured` give, or
`exact.fp8_block_scales` and `encode.fp8_block_encode`; where that way would round, or is the only one that is sure, it
is left to it, and the answer says so.

MXFP4 to NVFP4. 16 E2M1 codes are one 64-bit word, in which every step is taken at once. A code c = 0 … 7 of the E8M0
scale 2^e allows the exponents e + l to e + u of `exact.py`'s interval:

| code   | 0 | 1  | 2  | 3  | 4  | 5  | 6 | 7 |
|--------|---|----|----|----|----|----|---|---|
| value  | 0 | .5 | 1  | 1.5| 2  | 3  | 4 | 6 |
| l      |   | -3 | -2 | -2 | -1 | -1 | 0 | 0 |
| u      |   | 0  | 1  | 0  | 2  | 1  | 3 | 2 |

so a block has the largest l and the smallest u of its codes. Another exponent than e doubles or halves the values:
code 1 becomes 2, the others move by 2 (one binade), and back. The sum of squares, exact in F64, is counted in integers.

FP8 to FP8. The largest code of a 128x128 block tells by how much the power of two above amax/448 is below the scale
that lies there, and a table has each code times that power; in a release it is 1 everywhere, and nothing changes.

A kernel does it with the interpreter let go, so a pool of threads scales. Without Numba its twin here, in numpy, gives
the same bytes, but holds the interpreter too often for more than a few threads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4q.formats.compare import no_error
from dsv4q.formats.encode import E4M3_MAX, FP8_BLOCK, NVFP4_GROUP, WINDOW
from dsv4q.formats.exact import power_of_two
from dsv4q.formats.kernels import cpu_kernels, nvfp4_exact
from dsv4q.formats.native import E8M0_BIAS, E8M0_NAN, MXFP4_GROUP

Words = np.ndarray[Any, np.dtype[np.uint64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Each = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]
"""`map`, or that of a pool of threads."""

TILE = 1 << 16
"""Words that are worked on at once: 512 KiB and the temporaries of some dozen steps stay in a core's own cache."""

_LOW = np.uint64(0x1111_1111_1111_1111)
_1, _2 = np.uint64(1), np.uint64(2)
_MXFP4_CODES = (E8M0_BIAS - 73, E8M0_BIAS + 61)
"""E8M0 codes under which F32 holds the square of every value, from 2^-2 to 36 * 4^e; BF16 then holds the value."""
_FP8_CODES = (E8M0_BIAS - 65, E8M0_BIAS + 55)
"""The same for E4M3, whose squares go from 2^-18 to 448^2."""
_LARGEST_CODE = 125 + E8M0_BIAS
"""Under which an E2M1 value is a number in any case."""
_HALVES = 17
"""Binades between the smallest and the largest E4M3 value."""


@dataclass(frozen=True)
class Nvfp4:
    """T x P weights as the artifact has them.

    Attributes:
        exact: BOOL [T]; where it is false, nothing else is valid, and the ordinary way has to take the weights.
        packed: U8 [T, P, M, N/2].
        block_scale: F8_E4M3 [T, P, M, N/16].
        global_scale: F32 [T, 1], a divisor.
        sums: F64 [T, P, 4] as `compare.error_sums` gives them, of no error. The sum of squares is rounded once; the
            ordinary way rounds it too where exponents are too far apart for F64.
    """

    exact: Tensor
    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Fp8Blocks:
    """One weight as the artifact has it.

    Attributes:
        weight: F8_E4M3 [M, N].
        block_scale: F32 [ceil(M/128), ceil(N/128)], powers of two.
        sums: F64 [4], as in `Nvfp4`.
    """

    weight: Tensor
    block_scale: Tensor
    sums: Tensor


def mxfp4_to_nvfp4(packed: Tensor, scale: Tensor, each: Each = map) -> Nvfp4:
    """T x P weights on the CPU; the P of one T share a global scale.

    Args:
        packed: U8 or I8 [T, P, M, N/2], N a multiple of 16.
        scale: E8M0 as F8_E8M0 or U8, [T, P, M, ceil(N/32)].
        each: does the T, in threads if it is that of a pool.

    Raises:
        ValueError: shapes do not fit together.
    """
    count, shared, rows, half = packed.shape
    groups = half * 2 // NVFP4_GROUP
    if groups * NVFP4_GROUP != half * 2 or scale.shape != (count, shared, rows, -(-half * 2 // MXFP4_GROUP)):
        raise ValueError(f"packed {tuple(packed.shape)} and scale {tuple(scale.shape)} do not fit NVFP4")
    words = packed.contiguous().view(torch.uint8).numpy().view(np.uint64)
    codes = scale.contiguous().view(torch.uint8).numpy()
    found = Nvfp4(
        torch.zeros(count, dtype=torch.bool),
        torch.empty((count, shared, rows, half), dtype=torch.uint8),
        torch.empty((count, shared, rows, groups), dtype=torch.uint8),
        torch.empty((count, 1), dtype=torch.float32),
        torch.zeros((count, shared, 4), dtype=torch.float64),
    )
    to, scales = found.packed.numpy().view(np.uint64), found.block_scale.numpy()
    made: type[_Compiled | _Eager] = _Eager if cpu_kernels() is None else _Compiled

    def convert(index: int) -> None:
        parts = [made(*part) for part in zip(words[index], codes[index], strict=True)]
        exponent = _global_exponent(parts)
        if exponent is None or not all(
            part.write(exponent, *there) for part, *there in zip(parts, to[index], scales[index], strict=True)
        ):
            return
        found.exact[index] = True
        found.global_scale[index] = math.ldexp(1.0, exponent)
        found.sums[index] = no_error(torch.tensor([part.squares for part in parts], dtype=torch.float64))

    list(each(convert, range(count)))
    return replace(found, block_scale=found.block_scale.view(torch.float8_e4m3fn))


def bf16_to_nvfp4(weight: Tensor) -> Nvfp4 | None:
    """T x P weights on a GPU that are exact, BF16 [T, P, M, N]; the P of one T share a global scale.

    Waits for no device. None: there is no kernel for it here, so the ordinary way has to take them all.
    """
    found = nvfp4_exact(weight)
    if found is None:
        return None
    packed, scale, exponent, squares, failed = found
    block_scale, global_scale = scale.view(torch.float8_e4m3fn), power_of_two(exponent).reshape(-1, 1)
    return Nvfp4(failed == 0, packed, block_scale, global_scale, no_error(squares))


class _Mxfp4(ABC):
    """One weight: what its blocks of 16 allow.

    Args:
        words: U64 [M, G], the codes of each block.
        codes: U8 [M, ceil(G/2)], E8M0.

    Attributes:
        squares_by_code: [256], by E8M0 code the sum of (2 * value)^2 under it, an integer.
        top: largest lower end of a block's interval, as an exponent; None: there are zeros alone.
    """

    squares_by_code: np.ndarray[Any, Any]
    top: int | None

    def __init__(self, words: Words, codes: Bytes) -> None:
        self.words, self.codes = words, codes

    @property
    def is_sure(self) -> bool:
        """Whether every scale is a number, and every square one that F32 holds."""
        used = np.flatnonzero(self.squares_by_code)
        low, high = (int(used[0]), int(used[-1])) if len(used) else _MXFP4_CODES
        return int(self.codes.max(initial=0)) <= _LARGEST_CODE and _MXFP4_CODES[0] <= low and high <= _MXFP4_CODES[1]

    @property
    def squares(self) -> float:
        """Sum of the squares of all values."""
        return math.ldexp(float(_weighted(self.squares_by_code, range(256))), -2 * E8M0_BIAS - 2)

    @abstractmethod
    def write(self, exponent: int, words: Words, scales: Bytes) -> bool:
        """Blocks and their E4M3 scales under the global scale 2^`exponent`; false if a block is outside the window."""


class _Compiled(_Mxfp4):
    """By our kernels."""

    def __init__(self, words: Words, codes: Bytes) -> None:
        super().__init__(words, codes)
        kernels = cpu_kernels()
        assert kernels is not None
        self.squares_by_code = np.zeros(256, dtype=np.int64)
        top = kernels.nvfp4_look(words, codes, self.squares_by_code)
        self.top = None if top == kernels.NOTHING else top - E8M0_BIAS
        self._write = kernels.nvfp4_write

    def write(self, exponent: int, words: Words, scales: Bytes) -> bool:
        least = WINDOW[0] - exponent + E8M0_BIAS
        return bool(self._write(self.words, self.codes, least, _POWERS, words, scales))


class _Eager(_Mxfp4):
    """By numpy."""

    def __init__(self, words: Words, codes: Bytes) -> None:
        spread = np.repeat(codes, MXFP4_GROUP // NVFP4_GROUP, axis=-1)[:, : words.shape[1]]
        super().__init__(words.reshape(-1), spread.reshape(-1))
        self.lower = np.empty(len(self.words), dtype=np.int8)
        """l of each block; 1 where it is all zeros."""
        self.squares_by_code = np.zeros(256)
        for tile in _tiles(len(self.words)):
            self._look(tile)
        nonzero = self.lower <= 0
        ends = self.codes[nonzero].astype(np.int16) + self.lower[nonzero]
        self.top = int(ends.max()) - E8M0_BIAS if len(ends) else None

    def _look(self, tile: slice) -> None:
        words = self.words[tile]
        b0, b1, b2 = words & _LOW, words >> _1 & _LOW, words >> _2 & _LOW
        b12 = b1 & b2
        n0, n1, n2, n12 = (np.bitwise_count(bits) for bits in (b0, b1, b2, b12))
        # (2 * value)^2 = 0, 1, 4, 9, 16, 36, 64, 144 as a sum over the bits of a code and their products
        units = n0.astype(np.uint16)
        for count, weight in (
            (n1, 4), (n2, 16), (n12, 44), (np.bitwise_count(b0 & b1), 4), (np.bitwise_count(b0 & b2), 19),
            (np.bitwise_count(b0 & b12), 56),
        ):  # fmt: skip
            units += np.multiply(count, weight, dtype=np.uint16)
        self.squares_by_code += np.bincount(self.codes[tile], weights=units, minlength=256)
        from_2, from_4, from_6 = ((count > 0).view(np.int8) for count in (n1 | n2, n2, n12))
        lower = from_2 + from_4 + from_6 - np.int8(3)
        lower[units == 0] = 1
        self.lower[tile] = lower

    def write(self, exponent: int, words: Words, scales: Bytes) -> bool:
        words, scales = words.reshape(-1), scales.reshape(-1)
        return all(self._write(exponent, tile, words[tile], scales[tile]) for tile in _tiles(len(self.words)))

    def _write(self, exponent: int, tile: slice, to: Words, scales: Bytes) -> bool:
        lower, codes = self.lower[tile], self.codes[tile].astype(np.int16)
        zeros = lower > 0
        steps = np.maximum(WINDOW[0] - exponent + E8M0_BIAS - codes, lower)
        steps[zeros] = 0
        to[:] = self.words[tile]
        raised = steps > lower
        raised &= ~zeros
        if bool(raised.any()) and bool((steps[raised] > _upper(to[raised])).any()):
            return False
        for step in range(1, 1 - int(steps.min(initial=0))):
            to += _doubling(to) & _mask(steps <= -step)
        for step in range(1, 1 + int(steps.max(initial=0))):
            to -= _halving(to) & _mask(steps >= step)
        place = codes + steps + (exponent - E8M0_BIAS - WINDOW[0])
        place[zeros] = -WINDOW[0]
        _POWERS.take(place, out=scales)
        return True


_POWERS = torch.exp2(torch.arange(WINDOW[0], WINDOW[1] + 1)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
"""E4M3 codes of the powers of two, smallest first."""


def _global_exponent(parts: Sequence[_Mxfp4]) -> int | None:
    """As `exact.nvfp4_scales` finds it where every block is on the grid; None: leave it to that."""
    if not all(part.is_sure for part in parts):
        return None
    tops = [top for part in parts if (top := part.top) is not None]
    return min(max(WINDOW[1] - max(tops), -126), 127) if tops else 0


def _upper(words: Words) -> np.ndarray[Any, np.dtype[np.int8]]:
    """u of each block."""
    b0, b1, b2 = words & _LOW, words >> _1 & _LOW, words >> _2 & _LOW
    has_0 = (b0 & ~b2) != 0
    has_1 = ((b1 & ~b0 & ~b2) | (b2 & b0 & ~b1)) != 0
    has_2 = ((b2 & ~b1 & ~b0) | (b2 & b1 & b0)) != 0
    return np.where(has_0, 0, np.where(has_1, 1, np.where(has_2, 2, 3))).astype(np.int8)


def _doubling(words: Words) -> Words:
    """What to add to words of codes up to 5 so that their values double."""
    from_2 = (words >> _1 | words >> _2) & _LOW
    return (from_2 << _1) + (words & _LOW & ~from_2)


def _halving(words: Words) -> Words:
    """What to subtract from words without codes 1 and 3 so that their values halve."""
    from_4 = words >> _2 & _LOW
    return (from_4 << _1) + (words >> _1 & _LOW & ~from_4)


def _mask(chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Words:
    """All bits where `chosen`."""
    return np.negative(chosen.astype(np.uint64))


def _tiles(length: int) -> Iterable[slice]:
    return (slice(start, start + TILE) for start in range(0, length, TILE))


def fp8_to_fp8_blocks(weight: Tensor, scale: Tensor) -> Fp8Blocks | None:
    """One weight on the CPU; None: the ordinary way has to take it.

    Args:
        weight: F8_E4M3 [M, N].
        scale: E8M0 as F8_E8M0 or U8, [ceil(M/128), ceil(N/128)].

    Raises:
        ValueError: shapes do not fit together.
    """
    rows, columns = weight.shape
    if scale.shape != (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)):
        raise ValueError(f"scale {tuple(scale.shape)} does not fit weight {tuple(weight.shape)}")
    values = weight.contiguous().view(torch.uint8).numpy()
    codes = scale.contiguous().view(torch.uint8).numpy()
    if (codes == E8M0_NAN).any():
        return None
    found = np.empty_like(values)
    exponents = np.zeros(codes.shape, dtype=np.int32)
    squares = []
    starts = range(0, columns, FP8_BLOCK)
    for band, under in enumerate(codes):
        part = slice(band * FP8_BLOCK, (band + 1) * FP8_BLOCK)
        largest = np.maximum.reduceat((values[part] & np.uint8(0x7F)).max(axis=0), starts)
        nonzero = largest > 0
        low, high = under[nonzero].min(initial=_FP8_CODES[1]), under[nonzero].max(initial=_FP8_CODES[0])
        if largest.max() == 0x7F or low < _FP8_CODES[0] or high > _FP8_CODES[1]:
            return None
        steps = _fp8_steps()[largest]
        found[part] = values[part]
        if steps.any():
            found[part] = _fp8_scaled()[np.repeat(steps, FP8_BLOCK)[:columns], values[part]]
        exponents[band, nonzero] = under[nonzero].astype(np.int32) - E8M0_BIAS - steps[nonzero]
        squares.append(_weighted(np.add.reduceat(_fp8_squares()[values[part]].sum(axis=0), starts), under))
    return Fp8Blocks(
        torch.from_numpy(found).view(torch.float8_e4m3fn),
        torch.from_numpy(np.ldexp(np.float32(1), exponents)),
        no_error(torch.tensor(math.ldexp(float(sum(squares)), -2 * E8M0_BIAS - 18), dtype=torch.float64)),
    )


@cache
def _fp8_values() -> np.ndarray[Any, np.dtype[np.float64]]:
    """F64 [256]: the value of every E4M3 code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).numpy()


@cache
def _fp8_squares() -> np.ndarray[Any, np.dtype[np.float64]]:
    """F64 [256]: the square of every value in units of 2^-18, an integer."""
    return np.square(_fp8_values() * 2**9)


@cache
def _fp8_steps() -> np.ndarray[Any, np.dtype[np.int64]]:
    """I64 [128]: by how many binades a block grows whose largest magnitude has this code; 0 for zeros."""
    fraction, exponent = np.frexp(_fp8_values()[:128])
    steps = 9 - exponent - (fraction > 0.875)
    return np.where(fraction > 0, steps, 0)


@cache
def _fp8_scaled() -> Bytes:
    """U8 [18, 256]: the code of every value times 2^n, where there is one."""
    powers = 2.0 ** np.arange(_HALVES + 1)[:, None]
    scaled = torch.from_numpy(np.nan_to_num(_fp8_values()) * powers).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _weighted(sums: Iterable[float], codes: Iterable[int]) -> int:
    """Sum of each, an integer, times 4^code."""
    return sum(int(part) << 2 * int(code) for part, code in zip(sums, codes, strict=True))
