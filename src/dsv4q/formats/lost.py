"""Weights that are stored as zero, by the stored bytes alone: what one value far beyond the others does to them.

A scale that holds a huge value leaves the others below the smallest step. Their share of the tensor's energy is nothing
then, so the relative error, which is about energy, does not tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_LOST = 0.5
"""Gaussian weights lose a tenth in NVFP4 and up to a quarter in INT4."""

_SAMPLE = 1 << 16
"""Bytes of packed weights that are looked at in each tensor, evenly spread."""
_TILE = 128


def zero_shares(stored: Mapping[str, Tensor]) -> Tensor:
    """F64 [T]: share of the weights of each of T linears that is stored as zero; in FP8 of the worst 128x128 tile.

    Args:
        stored: stored tensors [T, ...] by suffix, of one scheme.
    """
    if "weight_packed" not in stored:
        zero = (stored["weight"].view(torch.uint8) & 0x7F) == 0
        rows, columns = zero.shape[1:]
        zero = pad(zero, (0, -columns % _TILE, 0, -rows % _TILE))
        tiles = zero.unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE))
        return tiles.sum(dim=(2, 4)).flatten(1).amax(dim=1).to(torch.float64) / min(_TILE, rows) / min(_TILE, columns)
    packed = stored["weight_packed"].flatten(1)
    bits = 4
    if packed.dtype is torch.int32:
        bits = 32 * stored["weight_packed"].shape[-1] // int(stored["weight_shape"][0, -1])
    data = packed.view(torch.uint8)
    data = data[:, :: max(1, data.shape[1] // _SAMPLE) | 1]
    if bits == 8:
        return (data == 0x80).to(torch.float64).mean(dim=1)
    zero_code, mask = (8, 0xF) if packed.dtype is torch.int32 else (0, 0x7)  # integers with an offset; E2M1 with a sign
    halves = [(data >> shift & mask) == zero_code for shift in (0, 4)]
    return torch.stack(halves).to(torch.float64).mean(dim=(0, 2))
