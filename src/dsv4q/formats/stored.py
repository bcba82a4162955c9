"""Stored tensors of a linear to numbers, whatever the layout: plain torch, any device.

A linear is stored as codes and as scales that blocks of them share. `decode` takes it whole, `StoredRows` some rows at
a time. Arithmetic is F32, as consumers do it: one product of code and scale, the global scale taken into the scale
first. Nothing is refused: a NaN or zero scale gives the values that it gives, for whoever compares them to count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4q.formats.dtypes import e2m1_pairs
from dsv4q.formats.encode import (
    FP8_BLOCK,
    NVFP4_GROUP,
    fp8_block_decode,
    int_group_decode,
    nvfp4_decode,
    unpacked_integers,
)
from dsv4q.layout import Shape

E2M1, E4M3, INTEGER = "e2m1", "e4m3", "integer"


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How stored codes become values: (code - zero point) * scale of the code's block, the global scale included."""

    codes: str
    """E2M1 (two in a byte, low nibble first), E4M3 or INTEGER."""
    block: tuple[int, int | None]
    """Rows and columns that share a scale, None for all columns; blocks at the edge may be smaller."""
    scale: str
    """Suffix of the scales."""
    bits: int = 8
    """Of an integer; below 8 they are packed densely into I32, else too if the weight is I32."""
    global_scale: str | None = None
    """Suffix of one number for the whole linear: a divisor if it is `weight_global_scale`, else a multiplier."""


NVFP4 = StoredForm(E2M1, (1, NVFP4_GROUP), "weight_scale", global_scale="weight_global_scale")
FP8_BLOCKS = StoredForm(E4M3, (FP8_BLOCK, FP8_BLOCK), "weight_scale")


def packed_integers(bits: int, columns: int | None) -> StoredForm:
    """Symmetric integers of compressed-tensors, one scale for each `columns` of a row, or for a whole row."""
    return StoredForm(INTEGER, (1, columns), "weight_scale", bits)


@torch.no_grad()
def decode(form: StoredForm, stored: Mapping[str, Tensor]) -> Tensor:
    """What the stored tensors of a linear stand for.

    Args:
        form: how they are stored.
        stored: by suffix. Of T linears alike [T, ...], where they are NVFP4, FP8_BLOCKS or packed integers of 4 or 8
            bits without zero points, whose arithmetic is that of `encode.py`.

    Returns:
        F32 [out, in], or [T, out, in].

    Raises:
        ValueError: shapes do not fit together.
    """
    codes, scale = _codes(stored), stored[form.scale]
    if form == NVFP4:
        return nvfp4_decode(codes, scale, stored["weight_global_scale"])
    if form == FP8_BLOCKS:
        return fp8_block_decode(codes, scale)
    plain = form.block[0] == 1 and not {"weight_zero_point", "weight_g_idx"} & stored.keys()
    if form.codes == INTEGER and form.bits in (4, 8) and codes.dtype == torch.int32 and plain:
        return int_group_decode(codes, scale, form.bits, form.block[1] or codes.shape[-1] * 32 // form.bits)
    linear = StoredRows(form, stored)
    return linear.rows(0, linear.shape[0])


def _codes(stored: Mapping[str, Tensor]) -> Tensor:
    return stored["weight_packed"] if "weight_packed" in stored else stored["weight"]


class StoredRows:
    """One linear, all of whose tensors are in memory on one device, to be decoded some rows at a time.

    Args:
        form: how it is stored.
        stored: by suffix, codes [out, ...]. Scales by blocks of rows and of columns, or one for each row, or one alone.
        shape: [out, in], where the codes do not tell it: packed integers fill their last word.
    """

    def __init__(self, form: StoredForm, stored: Mapping[str, Tensor], shape: Shape | None = None) -> None:
        self.form = form
        self.codes = _codes(stored)
        self.shape = (self.codes.shape[0], self._width()) if shape is None else shape
        self.block = (form.block[0], form.block[1] or self.shape[1])
        self.units = _units(form, stored)
        self.zeros = self._zero_points(stored.get("weight_zero_point"))
        self.columns = self._column_blocks(stored.get("weight_g_idx"))

    @property
    def step(self) -> int:
        """Rows that `rows` must begin at a multiple of."""
        return self.block[0] if self.units.shape[0] > 1 else 1

    def rows(self, begin: int, end: int) -> Tensor:
        """F32 [end - begin, in]; `begin` is a multiple of `step`."""
        values = _code_values(self.codes[begin:end], self.form, self.shape[1])
        if self.columns is None:
            values = values.view(end - begin, -1, self.block[1])
        if self.zeros is not None:
            values -= self._spread(self.zeros, begin, end)
        return values.mul_(self._spread(self.units, begin, end)).view(end - begin, self.shape[1])

    def _width(self) -> int:
        width: int = self.codes.shape[1]
        if self.form.codes == E2M1:
            return 2 * width
        return width * 32 // self.form.bits if self.codes.dtype == torch.int32 else width

    def _spread(self, per_block: Tensor, begin: int, end: int) -> Tensor:
        """What belongs to some rows, to be broadcast: a column for each value, or [rows, blocks, 1]."""
        height = self.block[0]
        chosen = per_block[begin // height : -(-end // height)]
        chosen = chosen.unsqueeze(-1) if self.columns is None else chosen.index_select(1, self.columns)
        if height == 1 or chosen.shape[0] == 1:
            return chosen
        return chosen.repeat_interleave(height, dim=0)[: end - begin]

    def _column_blocks(self, order: Tensor | None) -> Tensor | None:
        """I64 [in]: the block of each column; None if they lie in order and no block is smaller than the others."""
        if order is not None and bool((order >= 0).all()):  # -1 throughout: not used
            return order.to(torch.int64)
        width = self.block[1]
        whole = self.shape[1] == width * self.units.shape[1]
        return None if whole else torch.arange(self.shape[1], device=self.codes.device) // width

    def _zero_points(self, stored: Tensor | None) -> Tensor | None:
        """F32, shaped as the scales. Packed ones (I32) are packed along the rows."""
        if stored is None:
            return None
        if stored.dtype != torch.int32:
            return stored.to(torch.float32).reshape(self.units.shape)
        return unpacked_integers(stored.T, self.form.bits, self.units.shape[0]).T


def _units(form: StoredForm, stored: Mapping[str, Tensor]) -> Tensor:
    """F32 [blocks of rows, blocks of columns]: what one unit of a code is worth."""
    scale = stored[form.scale]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    units = scale.to(torch.float32)
    if units.numel() == 1:
        units = units.reshape(1, 1)
    elif units.ndim != 2:
        units = units.reshape(units.shape[0], -1)
    if form.global_scale == "weight_global_scale":
        return units / stored[form.global_scale].to(torch.float32).reshape(1, 1)
    if form.global_scale is not None:
        return units * stored[form.global_scale].to(torch.float32).reshape(1, 1)
    return units


def _code_values(codes: Tensor, form: StoredForm, columns: int) -> Tensor:
    """F32 [rows, in] without scales."""
    if form.codes == E2M1:
        table = e2m1_pairs(torch.float32, codes.device)
        pairs = table.index_select(0, codes.view(torch.uint8).flatten().to(torch.int32))
        return pairs.view(codes.shape[0], -1)[:, :columns]
    return unpacked_integers(codes, form.bits, columns) if codes.dtype == torch.int32 else codes.to(torch.float32)
