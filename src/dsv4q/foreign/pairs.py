"""Stored tensors of any layout of `layouts.py` to numbers, some rows at a time: plain torch, any device.

Nothing is refused here: a NaN or zero scale gives the values that it gives, for whoever compares them to count.
Arithmetic is F32, as consumers do it: one product of code and scale, the global scale taken into the scale first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from dsv4q.checkpoint.source import TORCH_NAMES
from dsv4q.foreign.layouts import E2M1, Encoding, Logical
from dsv4q.formats.native import E2M1_VALUES

DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
"""safetensors' names of dtypes."""
_WIDE = (torch.float64, torch.int64, torch.int32, torch.uint64, torch.uint32)
"""Dtypes that F32 does not hold."""


class Coded:
    """A quantized weight, all of whose parts are in memory on one device."""

    def __init__(self, logical: Logical, stored: Mapping[str, Tensor]) -> None:
        assert logical.encoding is not None
        self.shape, self.encoding = logical.shape, logical.encoding
        self.codes = next(tensor for suffix, tensor in stored.items() if suffix in ("weight_packed", "weight"))
        self.units = _units(self.encoding, stored)
        self.zeros = self._zero_points(stored.get("weight_zero_point"))
        self.columns = self._column_blocks(stored.get("weight_g_idx"))

    @property
    def step(self) -> int:
        """Rows that `rows` must begin at a multiple of."""
        return self.encoding.block[0] if self.units.shape[0] > 1 else 1

    def rows(self, begin: int, end: int) -> Tensor:
        """F32 [end - begin, in]; `begin` is a multiple of `step`."""
        values = _code_values(self.codes[begin:end], self.encoding, self.shape[1])
        width = self.encoding.block[1]
        if self.columns is None:
            values = values.view(end - begin, -1, width)
        if self.zeros is not None:
            values -= self._spread(self.zeros, begin, end)
        return values.mul_(self._spread(self.units, begin, end)).view(end - begin, self.shape[1])

    def _spread(self, per_block: Tensor, begin: int, end: int) -> Tensor:
        """What belongs to some rows, to be broadcast: a column for each value, or [rows, blocks, 1]."""
        height = self.encoding.block[0]
        chosen = per_block[begin // height : -(-end // height)]
        chosen = chosen.unsqueeze(-1) if self.columns is None else chosen.index_select(1, self.columns)
        if height == 1 or chosen.shape[0] == 1:
            return chosen
        return chosen.repeat_interleave(height, dim=0)[: end - begin]

    def _column_blocks(self, order: Tensor | None) -> Tensor | None:
        """I64 [in]: the block of each column; None if they lie in order and no block is smaller than the others."""
        if order is not None and bool((order >= 0).all()):  # -1 throughout: not used
            return order.to(torch.int64)
        width = self.encoding.block[1]
        whole = self.shape[1] == width * self.units.shape[1]
        return None if whole else torch.arange(self.shape[1], device=self.codes.device) // width

    def _zero_points(self, stored: Tensor | None) -> Tensor | None:
        """F32, shaped as the scales. Packed ones (I32) are packed along the rows."""
        if stored is None:
            return None
        if stored.dtype != torch.int32:
            return stored.to(torch.float32).reshape(self.units.shape)
        packed = stored.T.contiguous()
        return _unpacked(packed, self.encoding.bits, self.units.shape[0]).T.to(torch.float32)


def _units(encoding: Encoding, stored: Mapping[str, Tensor]) -> Tensor:
    """F32 [blocks of rows, blocks of columns]: what one unit of a code is worth."""
    scale = stored[encoding.scale]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    units = scale.to(torch.float32)
    if units.numel() == 1:
        units = units.reshape(1, 1)
    elif units.ndim != 2:
        units = units.reshape(units.shape[0], -1)
    if encoding.global_scale == "weight_global_scale":
        return units / stored[encoding.global_scale].to(torch.float32).reshape(1, 1)
    if encoding.global_scale is not None:
        return units * stored[encoding.global_scale].to(torch.float32).reshape(1, 1)
    return units


def _code_values(codes: Tensor, encoding: Encoding, columns: int) -> Tensor:
    """F32 [rows, in] without scales."""
    if encoding.codes == E2M1:
        table = _e2m1_pairs(codes.device)
        pairs = table.index_select(0, codes.view(torch.uint8).flatten().to(torch.int32))
        return pairs.view(codes.shape[0], -1)[:, :columns]
    packed = codes.dtype == torch.int32
    return (_unpacked(codes, encoding.bits, columns) if packed else codes).to(torch.float32)


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """I64 [rows, count]: integers packed densely along the last dimension, the first in the lowest bits."""
    wide = torch.nn.functional.pad(words.to(torch.int64).bitwise_and_(0xFFFFFFFF), (0, 1))
    bit = torch.arange(count, device=words.device) * bits
    low, offset = wide.index_select(1, bit // 32), bit % 32
    both = (low >> offset) | (wide.index_select(1, bit // 32 + 1) << (32 - offset))
    return both.bitwise_and_((1 << bits) - 1).sub_(1 << (bits - 1))


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """F32 [256, 2]: the two values of every byte, low nibble first."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack((table[byte & 15], table[byte >> 4]), dim=-1).to(device)


class Sums:
    """How the values of one tensor, or of many, differ; filled piece by piece."""

    def __init__(self) -> None:
        self.values = 0
        self.unequal = 0
        """Of another number; a NaN where the other has a NaN too is not counted."""
        self.zero_signs = 0
        """0 on one side and -0 on the other: equal numbers."""
        self.not_finite = 0
        """Unequal ones of which one is NaN or infinite; they are in no sum."""
        self.squared_error = 0.0
        self.squared_reference = 0.0
        self.max_abs_error = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count two pieces of the same shape."""
        kind = torch.float64 if reference.dtype in _WIDE or other.dtype in _WIDE else torch.float32
        mine, yours = reference.to(kind), other.to(kind)
        self.values += mine.numel()
        error = mine - yours
        squares, squared_error = _squares(mine), _squares(error)
        if not math.isfinite(squares + squared_error):
            mine, yours, error = self._without_odd_ones(mine, yours)
            squares, squared_error = _squares(mine), _squares(error)
        self.squared_reference += squares
        self.squared_error += squared_error
        if reference.is_floating_point() or other.is_floating_point():
            unequal = int(torch.count_nonzero(error))
            raw = torch.int64 if kind == torch.float64 else torch.int32
            # Of equal numbers only zeros have several representations.
            self.zero_signs += int(torch.count_nonzero(mine.view(raw) ^ yours.view(raw))) - unequal
        else:
            unequal = int(torch.count_nonzero(reference.to(torch.int64) != other.to(torch.int64)))
        self.unequal += unequal
        if unequal:
            self.max_abs_error = max(self.max_abs_error, *(abs(float(end)) for end in torch.aminmax(error)))

    def _without_odd_ones(self, mine: Tensor, yours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both and their difference, 0 where one is NaN or infinite; those are counted."""
        odd = ~(mine.isfinite() & yours.isfinite())
        found = int((odd & (mine != yours) & ~(mine.isnan() & yours.isnan())).sum())
        self.unequal += found
        self.not_finite += found
        mine, yours = mine.masked_fill(odd, 0), yours.masked_fill(odd, 0)
        return mine, yours, mine - yours

    def merge(self, other: Sums) -> None:
        """Add what was counted of another tensor."""
        for key in ("values", "unequal", "zero_signs", "not_finite", "squared_error", "squared_reference"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the difference over that of the reference; infinite where the reference is 0."""
        if not self.squared_reference:
            return math.inf if self.squared_error else 0.0
        return math.sqrt(self.squared_error / self.squared_reference)

    def as_dict(self) -> dict[str, float]:
        """For `--json`."""
        return {
            "values": self.values,
            "unequal": self.unequal,
            "signs_of_zero": self.zero_signs,
            "not_finite": self.not_finite,
            "relative_error": self.relative_error,
            "max_abs_error": self.max_abs_error,
        }


def _squares(values: Tensor) -> float:
    """Sum of squares. F32 does where nothing overflows or vanishes, ten times as fast on a CPU."""
    quick = float(values.square().sum())
    if 1e-20 < quick < math.inf or not (quick or bool(values.any())):
        return quick
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm * norm
