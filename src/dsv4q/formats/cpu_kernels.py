"""Numba kernels for the CPU, each the twin of eager code and bit-equal to it; import only through `kernels.py`.

They let go of the interpreter from begin to end, so a pool of threads has as many cores as it has threads. Each goes
over its bytes once, without temporaries. A word is a block of NVFP4: 16 E2M1 codes in 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic

NOTHING = -(1 << 20)
"""Stands for "no exponent"."""
_LOW, _SIZES = np.uint64(0x1111_1111_1111_1111), np.uint64(0x7777_7777_7777_7777)
"""Of every code in a word: its lowest bit; all of it but the sign."""
_0, _1, _2 = np.uint64(0), np.uint64(1), np.uint64(2)


def _kernel(function: Callable[..., Any]) -> Any:
    """Compiled when it is first called, and kept on disk where a folder for that can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@intrinsic
def _ones(typing: Any, word: Any) -> Any:
    """How many bits of a word are set: one instruction."""
    return word(word), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@_kernel
def _doubled(word):  # type: ignore[no-untyped-def]
    """A word of codes up to 5, with values twice as large."""
    from_2 = (word >> _1 | word >> _2) & _LOW
    return word + (from_2 << _1) + (word & _LOW & ~from_2)


@_kernel
def _halved(word):  # type: ignore[no-untyped-def]
    """A word without the codes 1 and 3, with values half as large."""
    from_4 = word >> _2 & _LOW
    return word - (from_4 << _1) - (word >> _1 & _LOW & ~from_4)


@_kernel
def _lower(word):  # type: ignore[no-untyped-def]
    """l of a block that is not all zeros, as `convert.py` has it."""
    b1, b2 = word >> _1 & _LOW, word >> _2 & _LOW
    return np.int64((b1 | b2) != _0) + np.int64(b2 != _0) + np.int64((b1 & b2) != _0) - 3


@_kernel
def _upper(word):  # type: ignore[no-untyped-def]
    """u of a block that is not all zeros."""
    b0, b1, b2 = word & _LOW, word >> _1 & _LOW, word >> _2 & _LOW
    if (b0 & ~b2) != _0:
        return 0
    if ((b1 & ~b0 & ~b2) | (b2 & b0 & ~b1)) != _0:
        return 1
    return 2 if ((b2 & ~b1 & ~b0) | (b2 & b1 & b0)) != _0 else 3


@_kernel
def nvfp4_look(words, codes, squares):  # type: ignore[no-untyped-def]
    """What the blocks of one MXFP4 weight allow.

    Args:
        words: U64 [M, G].
        codes: U8 [M, ceil(G/2)], E8M0.
        squares: I64 [256], receives by E8M0 code the sum of (2 * value)^2 under it.

    Returns:
        Largest lower end of a block's interval, as an E8M0 code, or `NOTHING`.
    """
    top = NOTHING
    for row in range(words.shape[0]):
        for group in range(words.shape[1]):
            word, code = words[row, group], np.int64(codes[row, group >> 1])
            b0, b1, b2 = word & _LOW, word >> _1 & _LOW, word >> _2 & _LOW
            b12 = b1 & b2
            squares[code] += np.int64(_ones(b0)) + 4 * np.int64(_ones(b1) + _ones(b0 & b1)) + (
                16 * np.int64(_ones(b2)) + 44 * np.int64(_ones(b12))
                + 19 * np.int64(_ones(b0 & b2)) + 56 * np.int64(_ones(b0 & b12))
            )  # fmt: skip
            if word & _SIZES != _0:
                top = max(top, code + _lower(word))
    return top


@_kernel
def nvfp4_write(words, codes, least, powers, to, scales):  # type: ignore[no-untyped-def]
    """The same weight under a global scale; false if a block is outside the window.

    Args:
        least: the E8M0 code that is the smallest E4M3 power of two then.
        powers: U8 [18], E4M3 codes of the powers of two, the smallest first; the tenth is 1.
        to: U64 [M, G], receives the blocks.
        scales: U8 [M, G], receives their E4M3 scales.
    """
    for row in range(words.shape[0]):
        for group in range(words.shape[1]):
            word, code = words[row, group], np.int64(codes[row, group >> 1])
            if word & _SIZES == _0:
                to[row, group] = word
                scales[row, group] = powers[9]
                continue
            lower = _lower(word)
            steps = max(least - code, lower)
            if steps > lower and steps > _upper(word):
                return False
            # Masks, not branches: which block is raised how far is as good as random.
            found = word
            for done in range(3):
                due = _0 - np.uint64(-steps > done)
                found = (_doubled(found) & due) | (found & ~due)
            for _ in range(steps):
                found = _halved(found)
            to[row, group] = found
            scales[row, group] = powers[code + steps - least]
    return True


@_kernel
def equal_words(mine, yours, codes, scales, exponents, base, reach):  # type: ignore[no-untyped-def]
    """Whether an MXFP4 weight and its NVFP4 form are shown to be equal, see `verify/packed.py`.

    Args:
        mine, yours: U64 [M, G].
        codes: U8 [M, ceil(G/2)], E8M0 of `mine`.
        scales: U8 [M, G], E4M3 of `yours`.
        exponents: I64 [256], the exponent of every E4M3 code that is a positive power of two; else `NOTHING`.
        base: what to add to an E8M0 code for its exponent under the global scale.
        reach: smallest and largest E8M0 code that is allowed.
    """
    for row in range(mine.shape[0]):
        wrong = False
        for group in range(mine.shape[1]):
            code, exponent = np.int64(codes[row, group >> 1]), exponents[scales[row, group]]
            shift = code + base - exponent
            swap = _0 - np.uint64(shift < 0)
            one, other = mine[row, group], yours[row, group]
            low, high = (one & ~swap) | (other & swap), (other & ~swap) | (one & swap)
            size, sign = low & _SIZES, low & ~_SIZES
            left = abs(shift) * np.int64(size != _0)
            wrong |= (left > 3) | (exponent == NOTHING) | (code < reach[0]) | (code > reach[1])
            for done in range(3):
                due = _0 - np.uint64(left > done)
                wrong |= (size >> _1 & size >> _2 & _LOW & due) != _0
                size = (_doubled(size) & due) | (size & ~due)
            wrong |= (size | sign) != high
        if wrong:
            return False
    return True


@_kernel
def equal_blocks(mine, yours, shift, doubled):  # type: ignore[no-untyped-def]
    """Whether E4M3 codes [M, N], U8, are equal and no NaN; 128x128 of `yours` have units 2^-shift of those of `mine`.

    Args:
        shift: I64 [ceil(M/128), ceil(N/128)].
        doubled: I16 [1 + doublings, 256], the code of each code's value, doubled so often; -1 where there is none.
    """
    for row in range(mine.shape[0]):
        wrong = False
        for block in range(shift.shape[1]):
            times = shift[row >> 7, block]
            table = doubled[abs(times)]
            for column in range(block << 7, min((block + 1) << 7, mine.shape[1])):
                one, other = mine[row, column], yours[row, column]
                low, high = (one, other) if times >= 0 else (other, one)
                wrong |= table[low] != np.int64(high)
        if wrong:
            return False
    return True


@_kernel
def fp8_encode(bits, exponents, codes, to):  # type: ignore[no-untyped-def]
    """BF16 as E4M3 under 128x128 blocks of powers of two; false if that rounds an element.

    Args:
        bits: U16 [M, N].
        exponents: I64 [ceil(M/128), ceil(N/128)].
        codes: I16 [65536], the E4M3 code of BF16's bits, -1 where there is none.
        to: U8 [M, N], receives the codes.
    """
    for row in range(bits.shape[0]):
        wrong = False
        for block in range(exponents.shape[1]):
            down = exponents[row >> 7, block] << 7
            for column in range(block << 7, min((block + 1) << 7, bits.shape[1])):
                value = np.int64(bits[row, column])
                size = value & 0x7FFF
                moved = size - down
                # A normal number stays one, or leaves E4M3's range anyway.
                inside = (size >= 0x80) & (moved >= 0x80) & (moved < 0x7F80)
                code = np.int64(codes[moved if inside else 0]) if size else 0
                if (size != 0 and not inside) or code < 0:
                    wrong = True
                to[row, column] = (code & 0x7F) | (value >> 8 & 0x80)
        if wrong:
            return False
    return True


@_kernel
def mxfp4_decode(packed, codes, values, out):  # type: ignore[no-untyped-def]
    """MXFP4 as BF16.

    Args:
        packed: U8 [R, H].
        codes: U8 [R, ceil(H/16)], E8M0.
        values: U16 [256, 16], the bits of every E2M1 code under every E8M0 code.
        out: U16 [R, 2H], receives the bits.
    """
    for row in range(packed.shape[0]):
        for at in range(packed.shape[1]):
            pair, code = packed[row, at], codes[row, at >> 4]
            out[row, 2 * at] = values[code, pair & 15]
            out[row, 2 * at + 1] = values[code, pair >> 4]


@_kernel
def fp8_decode(weight, codes, values, out):  # type: ignore[no-untyped-def]
    """FP8 blocks as BF16.

    Args:
        weight: U8 [M, N], E4M3.
        codes: U8 [ceil(M/128), ceil(N/128)], E8M0.
        values: U16 [256, 256], the bits of every E4M3 code under every E8M0 code.
        out: U16 [M, N], receives the bits.
    """
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            out[row, column] = values[codes[row >> 7, column >> 7], weight[row, column]]
