"""Nearest values on DeepSeek's weight formats: codes for the files, rounded weights for training.

MXFP4: E2M1 and one power of two for 32 columns; FP8: E4M3 and one power of two for 128x128. The scale is the smallest
power of two under which the largest value of its block is in range, so nothing is clipped and the gradient of the
straight-through estimate is 1 everywhere. Formats: `dsv4q/formats/native.py`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsv4q.checkpoint.native import FP8, MXFP4
from dsv4q.formats.encode import FP8_BLOCK
from dsv4q.formats.native import E8M0_BIAS, MXFP4_GROUP

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
LARGEST = {MXFP4: 6.0, FP8: 448.0}
LEAST_EXPONENT = -60
"""A block of zeros has no scale of its own; tiny ones need none that is further away than this."""


def scale_codes(amax: Tensor, form: str) -> Tensor:
    """E8M0 codes, I32, of the scales of blocks with these largest absolute values (F32)."""
    fraction, exponent = torch.frexp(amax / LARGEST[form])
    return (exponent - (fraction == 0.5).to(exponent.dtype)).clamp_min(LEAST_EXPONENT) + E8M0_BIAS


def power_of_two(codes: Tensor) -> Tensor:
    """F32 values of E8M0 codes (I32): the exponent field, which no library's `pow` can get wrong."""
    return codes.to(torch.int32).bitwise_left_shift(23).view(torch.float32)


@cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def mxfp4_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """F32 [..., N], N a multiple of 32 -> E2M1 codes I64 [..., N/32, 32] without sign, E8M0 codes I32 [..., N/32]."""
    groups = weight.unflatten(-1, (-1, MXFP4_GROUP))
    codes = scale_codes(groups.abs().amax(-1), MXFP4)
    scaled = (groups / power_of_two(codes)[..., None]).abs()
    return torch.bucketize(scaled, on_device(MIDDLES, weight.device)), codes


def fp8_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """F32 [M, N] -> F8_E4M3 [m, 128, n, 128] by blocks, zeros beyond the edge, E8M0 codes I32 [m, n]."""
    rows, columns = weight.shape
    padded = functional.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    codes = scale_codes(blocks.abs().amax((1, 3)), FP8)
    return (blocks / power_of_two(codes)[:, None, :, None]).to(torch.float8_e4m3fn), codes


def rounded(weight: Tensor, form: str) -> Tensor:
    """The weight's nearest values in a format: F32 of the same shape."""
    if form == MXFP4:
        index, codes = mxfp4_parts(weight)
        return (on_device(E2M1, weight.device)[index] * power_of_two(codes)[..., None]).flatten(-2).copysign(weight)
    values, codes = fp8_parts(weight)
    whole = (values.to(torch.float32) * power_of_two(codes)[:, None, :, None]).flatten(2).flatten(0, 1)
    return whole[: weight.shape[0], : weight.shape[1]]


def encoded(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Weight F32 [M, N] as it lies in a native checkpoint, on the CPU: `.weight` and `.scale` (F8_E8M0)."""
    weight = weight.detach().float().cpu()
    if form == MXFP4:
        index, codes = mxfp4_parts(weight)
        signed = (index.flatten(-2) | weight.signbit().to(index.dtype) << 3).to(torch.uint8)
        values = (signed[:, 0::2] | signed[:, 1::2] << 4).view(torch.int8)
    else:
        blocks, codes = fp8_parts(weight)
        values = blocks.view(torch.uint8).flatten(2).flatten(0, 1)[: weight.shape[0], : weight.shape[1]]
        values = values.contiguous().view(torch.float8_e4m3fn)
    return values, codes.to(torch.uint8).view(torch.float8_e8m0fnu)


class Rounding(nn.Module):
    """Parametrization of a weight: its rounded values once `on`, with the gradient of the weight itself."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.on = False

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        with torch.no_grad():
            step = rounded(weight, self.form) - weight
        return weight + step
