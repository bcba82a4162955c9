"""The values that made-up tensors are cut from: a pool for each kind, a function of seed and kind alone.

A pool on a grid has two forms, made of the same draws: BF16, and what DeepSeek's files would hold of the same values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from dsv4q.formats.dtypes import E2M1_VALUES

if TYPE_CHECKING:
    import numpy as np

MXFP4_GRID, FP8_GRID, NORMAL, HASH_TABLE = "mxfp4", "fp8", "normal", "experts"
GROUP = 32
"""Elements under one MXFP4 scale."""

_SIGMA = 64
"""Deviation of the E4M3 values: of 65,536 quantiles the last is at 4.2 deviations, so that 448 is not reached."""


@dataclass(frozen=True)
class Kind:
    """Where the values of a tensor come from; tensors of one kind share a pool."""

    name: str
    dtype: str
    scale: float = 1.0
    """Standard deviation, or the power of two next to it; of hash tables the number of experts."""
    mean: float = 0.0
    width: int = 1
    """Elements that belong together: a piece begins and ends between two such groups."""


def make_pool(kind: Kind, count: int, seed: int) -> np.ndarray[Any, Any]:
    """The pool of a kind: `count` elements, as U8."""
    import numpy as np

    rng = _generator(kind, seed)
    if kind.name == MXFP4_GRID:
        return _mxfp4(kind, count, rng).view(np.uint8)
    if kind.name == FP8_GRID:
        return _fp8(kind, count, rng).view(np.uint8)
    if kind.name == HASH_TABLE:
        order = rng.random((count // kind.width, int(kind.scale)), dtype=np.float32).argsort(axis=1, kind="stable")
        return order[:, : kind.width].astype(np.int64, order="C").reshape(-1).view(np.uint8)
    values = rng.standard_normal(count, dtype=np.float32) * np.float32(kind.scale) + np.float32(kind.mean)
    return (_bf16(values) if kind.dtype == "BF16" else values).view(np.uint8)


def make_packed_pool(kind: Kind, count: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The same values as codes and scales.

    Returns:
        MXFP4: U8 [count/2], two codes a byte, the first in the low half, and E8M0 as U8 [count/32].
        FP8: E4M3 as U8 [count], and the one scale of all as U8 [1].
    """
    import numpy as np

    rng = _generator(kind, seed)
    if kind.name == FP8_GRID:
        codes = _e4m3_quantiles().view(np.uint8)[rng.integers(0, 65536, count, dtype=np.uint16)]
        return codes, _e8m0(kind.scale / _SIGMA, np.zeros(1))
    nibbles = _e2m1_quantiles()
    packed = np.empty((count // GROUP, GROUP // 2), dtype=np.uint8)
    scales = np.empty(count // GROUP, dtype=np.uint8)
    for rows, factor, index in _mxfp4_draws(count, rng):
        codes = nibbles[index]
        packed[rows] = codes[:, 0::2] | codes[:, 1::2] << 4
        scales[rows] = _e8m0(kind.scale, factor[:, 0])
    return packed.reshape(-1), scales


def _generator(kind: Kind, seed: int) -> np.random.Generator:
    import numpy as np

    key = hashlib.blake2b(f"{seed}:{kind}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def _mxfp4(kind: Kind, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """BF16 as U16: Gaussian quantiles rounded to E2M1, times a power of two for each group of 32."""
    import numpy as np

    nibbles = _e2m1_quantiles()
    values = np.copysign(np.array(E2M1_VALUES[:8])[nibbles & 7], 4.0 - (nibbles & 8))
    # Their deviation is about 2.2, and that of the four factors 0.6.
    table = _bf16((kind.scale * 2.0 ** -np.arange(4.0)[:, None] * values).astype(np.float32))
    pool = np.empty((count // GROUP, GROUP), dtype=np.uint16)
    for rows, factor, index in _mxfp4_draws(count, rng):
        pool[rows] = table[factor, index]
    return pool.reshape(-1)


def _mxfp4_draws(
    count: int, rng: np.random.Generator
) -> Iterator[tuple[slice, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Groups of a pool, some at a time: which rows, negative exponent U8 [n, 1], numbers of quantiles U8 [n, 32]."""
    import numpy as np

    groups = count // GROUP
    for rows in np.array_split(np.arange(groups), max(1, count >> 20)):
        factor = rng.integers(0, 4, (len(rows), 1), dtype=np.uint8)
        yield (
            slice(int(rows[0]), int(rows[-1]) + 1),
            factor,
            rng.integers(0, 256, (len(rows), GROUP), dtype=np.uint8),
        )


def _e2m1_quantiles() -> np.ndarray[Any, Any]:
    """256 Gaussian quantiles as the nearest E2M1, the outermost as 6: codes U8, the sign in bit 3."""
    import numpy as np

    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])
    grid = np.array(E2M1_VALUES[:8])
    codes = np.abs(np.abs(quantiles[:, None]) * 6 / quantiles[-1] - grid).argmin(axis=1)
    return codes.astype(np.uint8) | np.signbit(quantiles).astype(np.uint8) << 3


def _fp8(kind: Kind, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """BF16 as U16: Gaussian quantiles rounded to E4M3, times one power of two."""
    import numpy as np
    import torch

    values = torch.from_numpy(_e4m3_quantiles()).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    table = _bf16(values * np.float32(kind.scale / _SIGMA))
    return table[rng.integers(0, 65536, count, dtype=np.uint16)]


def _e4m3_quantiles() -> np.ndarray[Any, Any]:
    """65,536 Gaussian quantiles of deviation `_SIGMA` as the nearest E4M3, as U8."""
    import torch

    normal = NormalDist(sigma=_SIGMA)
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], dtype=torch.float32)
    return quantiles.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _e8m0(scale: float, factor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """E8M0 of scale * 2^-factor, as U8; `scale` is a power of two."""
    import numpy as np

    from dsv4q.formats.native import E8M0_BIAS

    return (E8M0_BIAS + int(math.log2(scale)) - factor.astype(np.int64)).astype(np.uint8)


def _bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """U16 bit patterns of finite F32 values as BF16, ties to even."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
