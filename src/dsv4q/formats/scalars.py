"""One F32 number: its bytes, and its reciprocal as F32 arithmetic has it."""

from __future__ import annotations

import math
import struct

F32_BYTES = 4


def to_bytes(value: float) -> bytes:
    """The four bytes of a number that F32 holds, little-endian."""
    return struct.pack("<f", value)


def from_bytes(raw: bytes | memoryview) -> float:
    """The number in four bytes."""
    (value,) = struct.unpack("<f", raw)
    return float(value)


def reciprocal(value: float) -> float | None:
    """1/x of an F32, rounded to F32 once; None where x is not positive and finite, or 1/x is beyond F32.

    F64 has more than twice the bits of F32 and two, so rounding its quotient again is rounding the true one.
    """
    if not 0 < value < math.inf:
        return None
    try:
        return from_bytes(to_bytes(1.0 / value)) or None
    except OverflowError:
        return None
