"""How far a quantized weight may be from its source: the bounds, as pure tensor maths.

That the source, encoded with the artifact's own scales, gives the artifact's bytes proves the values, not the scales: a
block scale twice too large re-encodes just as well. Two bounds close that gap. Letters: w source value, q stored value,
u what one unit of the grid is worth in this block (its effective scale), a = max|w| of the block.

1. Each element. Nearest rounding leaves |w - q*u| <= u * h(|w|/u), h half the distance of the two grid values around
   |w|/u: E2M1 1/4 below 2, 1/2 below 4, else 1; E4M3 2^(e-4) with e = floor(log2 |w|/u), at least -6; integers 1/2.
   Above the largest value m it is clipping: |w| - m*u. A quotient that was rounded to BF16 first adds |w| * 2^-8.
2. Each scale. The range observer sets u = a/t (t = 6, 448, or (2^bits - 1)/2), rounded to the scale's dtype: E4M3
   within 1/16, or 2^-10 of its units where it is subnormal; BF16 within 2^-8, twice. Stock observers that search for
   the least error shrink the range to 0.8 of that at most; those made for NVFP4 widen it to 1.8 at most, and then only
   because it pays: a widened block must not have a larger error than with u = a/t, and is never alone. Scales that are
   all powers of two are another honest choice: the smallest that clips nothing, so 1 <= u*t/a < 2.
   A block without any error needs no bound: on an exact grid a larger scale may be needed to fit the window.
   compressed-tensors replaces a scale that rounds to zero by 0.125 (E4M3).

What passes nevertheless: where an observer widens, a scale wrong by less than that much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4q.formats.encode import nvfp4_decode, nvfp4_encode
from dsv4q.verify.schemes import ValueGrid

_ROUNDING = 2.0**-7
"""Room for two roundings to BF16."""
_SHRINK, _WIDEN = 0.8, 1.8
_TINY = 2.0**-110
"""Blocks below this are at the end of BF16's own range; their scales cannot be exact."""
_COMMON = 16
"""An observer that widens does so in more than one block of 16."""
_FAMILY = 8
"""So many scales that are all powers of two are no accident."""


@dataclass(frozen=True)
class Blocks:
    """One linear as blocks that share a scale: n blocks of k elements, all F32."""

    weight: Tensor
    """[n, k], from the source."""
    decoded: Tensor
    """[n, k], from the artifact."""
    unit: Tensor
    """[n], effective scale."""


def far_elements(blocks: Blocks, grid: ValueGrid, *, bf16_quotient: bool) -> Tensor:
    """Bound 1: bool [n, k], true where the error is larger than nearest rounding and clipping leave."""
    unit = blocks.unit.unsqueeze(-1)
    magnitude = blocks.weight.abs()
    scaled = magnitude / unit
    allowed = torch.maximum(grid.half_step(scaled), scaled - grid.largest).mul_(unit)
    allowed += magnitude * (2.0**-8 if bf16_quotient else 2.0**-20)
    return (blocks.weight - blocks.decoded).abs_() > allowed


def dishonest_scales(blocks: Blocks, grid: ValueGrid, global_scale: Tensor | None) -> Tensor:
    """Bound 2: bool [n], true where no honest observer would have chosen this scale.

    Args:
        blocks: the linear.
        grid: its format.
        global_scale: F32 [1], NVFP4 only: block scales are E4M3 numbers divided by it.
    """
    ideal = blocks.weight.abs().amax(-1) / grid.range
    error = (blocks.weight - blocks.decoded).square_().sum(-1)
    step = torch.zeros((), device=ideal.device) if global_scale is None else 2.0**-10 / global_scale.reshape(())
    coarse = 1 / 16 if global_scale is not None else 0.0
    if powers_of_two(blocks.unit):
        low = ideal * (1 - _ROUNDING) if len(ideal) >= _FAMILY else ideal * _SHRINK * (1 - _ROUNDING)
        wrong = (blocks.unit < low) | (blocks.unit >= 2 * ideal) & (blocks.unit > 2 * step)
    else:
        low = ideal * (_SHRINK * (1 - coarse) * (1 - _ROUNDING)) - step
        high = ideal * ((1 + coarse) * (1 + _ROUNDING)) + step
        wrong = (blocks.unit < low) | (blocks.unit > high)
        if global_scale is not None:
            wrong &= ~_pays(blocks, ideal, error, blocks.unit > high, global_scale)
            wrong &= ~((ideal * _SHRINK <= step * (1 + _ROUNDING)) & (blocks.unit <= 128 * step))
    return wrong & (error > 0) & (ideal > _TINY)


def powers_of_two(scale: Tensor) -> bool:
    """Whether every element is 2^k."""
    return bool((torch.frexp(scale.to(torch.float32)).mantissa == 0.5).all())


def _pays(blocks: Blocks, ideal: Tensor, error: Tensor, wide: Tensor, global_scale: Tensor) -> Tensor:
    """bool [n]: blocks whose scale is wider than the range needs (`wide`), honestly.

    Only an observer that widens makes such blocks, and it makes many: a few are a defect. Honest is at most 1.8 times,
    with an error no larger than at the plain scale, but for the rounding of the scale to E4M3 that comes after the
    search: by 1/16 at most, which moves each value by as much.
    """
    candidates = wide & (blocks.unit <= ideal * (_WIDEN * (17 / 16) * (1 + _ROUNDING)))
    if not bool(candidates.any()) or int(wide.sum()) * _COMMON < len(wide):
        return torch.zeros_like(wide)
    weight = blocks.weight[candidates]
    plain = (ideal[candidates] * global_scale).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).unsqueeze(-1)
    decoded = nvfp4_decode(nvfp4_encode(weight, plain, global_scale), plain, global_scale)
    reference = (weight - decoded).square_().sum(-1).sqrt()
    honest = torch.zeros_like(wide)
    honest[candidates] = error[candidates].sqrt() <= reference + weight.square().sum(-1).sqrt() / 16
    return honest
