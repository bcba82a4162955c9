"""Scales under which a weight is stored without error, where there are any; the best ones elsewhere.

A weight that was once MXFP4 or FP8 with power-of-two scales is still on that grid after dequantization to BF16,
and NVFP4 and FP8 block can hold the grid exactly. Whether it is, is decided on bits, never by a tolerance.

NVFP4. A block of 16 values is on the grid when one 2^k divides all of them into E2M1's 0, 0.5, 1, 1.5, 2, 3, 4, 6.
With a nonzero |v| = f * 2^e, f in [0.5, 1), that needs f = 0.5 or 0.75, and then every k in
[e - 3, e] (f = 0.5) or [e - 3, e - 1] (f = 0.75) does: so a block has an interval of exact k, or none. The stored
block scale is 2^(k + g) in E4M3 with the global scale 2^g; E4M3 has the powers 2^-9 … 2^8, so one g serves a whole
tensor (w1 and w3 together) if their blocks' intervals all meet a window of 18 binades.
A block that is off the grid or outside the window gets the E4M3 scale of least squared error, found among the codes
from 0.77 to 2 times amax/6; the search `nvfp4_expanded_mse` of llmcompressor covers 0.8 to 1.8 times, without
rounding its candidates to E4M3.

FP8 128x128. The scale is 2^ceil(log2(amax / 448)): exact for every block on the grid, since E4M3 times 2 stays E4M3 up
to 448, and a power of two elsewhere too, because the consumer stores UE8M0 and rounds again what is not one.

Shape letters: T tensors that are independent, P tensors that share a global scale (w1, w3), M rows, N columns,
G = N / 16 blocks in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4q.formats.encode import E2M1_MAX, E4M3_MAX, FP8_BLOCK, NVFP4_GROUP, TILE, WINDOW
from dsv4q.formats.kernels import nvfp4_grid_bits

SEARCH = (-3, 8)
"""Offsets in E4M3 codes around amax/6; eight codes are a factor of two."""
_NONE = 1 << 20
"""Stands for "no bound" among exponents."""
_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Elements of a weight that are worked on at once: bounds the temporaries to some hundred MB, some GB on a GPU."""


@dataclass(frozen=True)
class Nvfp4Scales:
    """Scales of T x P weights.

    Attributes:
        block_scale: F32 [T, P, M, G], values that E4M3 has.
        global_scale: F32 [T, 1], a divisor, a power of two, shared by the P tensors.
        exact_blocks: I64 [T, P], blocks stored without error.
    """

    block_scale: Tensor
    global_scale: Tensor
    exact_blocks: Tensor


@dataclass(frozen=True)
class ExactExponents:
    """For each block of 16: the interval of exact exponents k, empty where `lower > upper`; and amax.

    Attributes:
        lower, upper: I32 [..., M, G]; a block of zeros has (-_NONE, _NONE).
        amax: F32 [..., M, G].
    """

    lower: Tensor
    upper: Tensor
    amax: Tensor


@torch.no_grad()
def nvfp4_grid(weight: Tensor) -> ExactExponents:
    """Interval of exact exponents of every block of a weight [..., M, N] (BF16, F16 or F32), N a multiple of 16."""
    if not weight.is_cuda and weight.numel() > TILE and weight.is_contiguous():
        rows = weight.reshape(-1, weight.shape[-1])
        parts = [nvfp4_grid(part) for part in torch.split(rows, max(1, TILE // rows.shape[1]))]
        if len(parts) > 1:
            shape = (*weight.shape[:-1], weight.shape[-1] // NVFP4_GROUP)
            lower, upper, amax = (
                torch.cat(found) for found in zip(*((p.lower, p.upper, p.amax) for p in parts), strict=True)
            )
            return ExactExponents(lower.view(shape), upper.view(shape), amax.view(shape))
    if weight.dtype is torch.bfloat16:
        by_kernel = nvfp4_grid_bits(weight)
        found = _bf16_grid(weight) if by_kernel is None else ExactExponents(*by_kernel)
        if found is not None:
            return found
    blocks = _groups(weight).to(torch.float32)
    fraction, exponent = torch.frexp(blocks.abs())
    zero, half, three_quarters = fraction == 0, fraction == 0.5, fraction == 0.75
    lower = torch.where(zero, -_NONE, exponent - 3).amax(dim=-1)
    upper = torch.where(zero, _NONE, exponent - three_quarters.to(torch.int32)).amin(dim=-1)
    off = ~(zero | half | three_quarters).all(dim=-1)
    return ExactExponents(lower, torch.where(off, -2 * _NONE, upper), blocks.abs().amax(dim=-1))


def _bf16_grid(weight: Tensor) -> ExactExponents | None:
    """The same on BF16's own bits, several times as fast; None if there are subnormals, whose bits read otherwise.

    |v| is eight bits of exponent E, e = E - 126, and seven of fraction: f = 0.5 has none set, f = 0.75 the top one.
    """
    bits = _groups(weight).view(torch.int16) & 0x7FFF
    largest = bits.amax(dim=-1)
    # 0 becomes the largest number here, so that zeros take no part in a minimum.
    nonzero = (bits - 1) & 0x7FFF
    if bool((nonzero < 0x7F).any()):
        return None
    off = (bits & 0x3F).amax(dim=-1) > 0
    exponent = torch.where(bits == 0, 0x7FFF, (bits >> 7) - ((bits >> 6) & 1)).amin(dim=-1)
    zeros = largest == 0
    lower = torch.where(zeros, -_NONE, (largest >> 7).to(torch.int32) - 129)
    upper = torch.where(zeros, _NONE, exponent.to(torch.int32) - 126)
    return ExactExponents(lower, torch.where(off, -2 * _NONE, upper), largest.view(torch.bfloat16).to(torch.float32))


@torch.no_grad()
def nvfp4_scales(weight: Tensor) -> Nvfp4Scales:
    """Scales of weights [T, P, M, N]; the P tensors of one T share a global scale.

    Raises:
        ValueError: N is not a multiple of 16, or a value is not finite.
    """
    if weight.shape[-1] % NVFP4_GROUP:
        raise ValueError(f"NVFP4 needs columns in multiples of {NVFP4_GROUP}, not {weight.shape[-1]}")
    step = max(1, _CHUNK[weight.device.type] // max(1, weight[0].numel()))
    parts = [_nvfp4_scales(part) for part in torch.split(weight, step)]
    if len(parts) == 1:
        return parts[0]
    return Nvfp4Scales(
        torch.cat([p.block_scale for p in parts]),
        torch.cat([p.global_scale for p in parts]),
        torch.cat([p.exact_blocks for p in parts]),
    )


def _nvfp4_scales(weight: Tensor) -> Nvfp4Scales:
    grid = nvfp4_grid(weight)
    exponent = _global_exponent(grid)
    low = WINDOW[0] - exponent.reshape(-1, 1, 1, 1)
    high = WINDOW[1] - exponent.reshape(-1, 1, 1, 1)
    k = torch.maximum(grid.lower, low)
    exact = (k <= torch.minimum(grid.upper, high)) & (grid.lower <= grid.upper)
    zeros = grid.amax == 0
    scale = power_of_two(torch.where(exact, k - low + WINDOW[0], 0))
    scale = torch.where(zeros, 1.0, scale)
    global_scale = power_of_two(exponent)
    # Asked together: a GPU that is asked has nothing to do until the answer is here.
    finite, all_exact = torch.stack([torch.isfinite(grid.amax).all(), exact.all()]).tolist()
    if not finite:
        raise ValueError("NVFP4 cannot store NaN or Inf")
    if not all_exact:
        found = _search(weight, grid.amax, global_scale.reshape(-1, 1, 1, 1), ~exact)
        scale[~exact] = found
    return Nvfp4Scales(scale, global_scale.reshape(-1, 1), exact.sum(dim=(-2, -1)))


def _global_exponent(grid: ExactExponents) -> Tensor:
    """I32 [T]: g, as large as the largest block of each T allows, so that small blocks stay above the subnormals."""
    on = grid.lower <= grid.upper
    zero = grid.amax == 0
    top = torch.where(on & ~zero, grid.lower, -_NONE).amax(dim=(1, 2, 3))
    # A searched block may take up to twice amax/6, which must stay below E4M3's 448.
    _, loud = torch.frexp(torch.where(on, 0.0, grid.amax).amax(dim=(1, 2, 3)) * (2 / E2M1_MAX / E4M3_MAX))
    by_search = torch.where((~on).any(dim=3).any(dim=2).any(dim=1), -loud, _NONE)
    by_grid = torch.where(top > -_NONE, WINDOW[1] - top, _NONE)
    exponent = torch.minimum(by_grid, by_search)
    # All zero: any scale does. Beyond F32's exponents a global scale would be subnormal or infinite.
    return torch.where(exponent == _NONE, 0, exponent).clamp(-126, 127).to(torch.int32)


def _search(weight: Tensor, amax: Tensor, global_scale: Tensor, wanted: Tensor) -> Tensor:
    """Best E4M3 block scale, F32 [n], of the n blocks where `wanted` [T, P, M, G] is true."""
    blocks, divisor, largest = _groups(weight)[wanted], global_scale.expand_as(amax)[wanted], amax[wanted]
    step = len(blocks) if weight.is_cuda else TILE // NVFP4_GROUP
    parts = (torch.split(whole, max(1, step)) for whole in (blocks, divisor, largest))
    return torch.cat([_best_scale(*part) for part in zip(*parts, strict=True)])


def _best_scale(blocks: Tensor, divisor: Tensor, amax: Tensor) -> Tensor:
    """The same for blocks [n, 16] with their global scale and largest magnitude, both F32 [n]."""
    blocks = blocks.to(torch.float32)
    ideal = (amax / E2M1_MAX * divisor).clamp(max=E4M3_MAX)
    start = ideal.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    # Errors are compared in units of the block's own binade, or their squares would leave F32's range.
    _, binade = torch.frexp(amax)
    unit_of_error = power_of_two((-binade).clamp(-126, 127)).unsqueeze(-1)
    best = torch.full_like(ideal, torch.inf)
    scale = torch.ones_like(ideal)
    for offset in range(SEARCH[0], SEARCH[1] + 1):
        code = (start + offset).clamp(1, 126).to(torch.uint8)
        candidate = code.view(torch.float8_e4m3fn).to(torch.float32)
        unit = (candidate / divisor).unsqueeze(-1)
        error = (round_e2m1(blocks / unit).mul_(unit) - blocks).mul_(unit_of_error).square_().sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
    return scale


def _groups(weight: Tensor) -> Tensor:
    """View [..., M, G, 16] of [..., M, N]."""
    return weight.reshape(*weight.shape[:-1], -1, NVFP4_GROUP)


def power_of_two(exponent: Tensor) -> Tensor:
    """F32 2^exponent for I32 exponents in [-126, 127], made of its bits: exact on every device."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def round_e2m1(scaled: Tensor) -> Tensor:
    """Nearest E2M1 value of each element, ties to the even code, clipped at 6: what the encoder stores. F32.

    In each binade the spacing is a quarter of 2^ceil, at least 0.5: rounding to a multiple of it is rounding to E2M1.
    """
    magnitude = scaled.abs().clamp_(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round_().mul_(step), scaled)


@torch.no_grad()
def fp8_block_scales(weight: Tensor) -> Tensor:
    """Power-of-two scales F32 [..., ceil(M/128), ceil(N/128)] of a weight [..., M, N]; 1 for a block of zeros.

    Raises:
        ValueError: a value is not finite.
    """
    rows, columns = (-(-n // FP8_BLOCK) for n in weight.shape[-2:])
    ragged = (0, columns * FP8_BLOCK - weight.shape[-1], 0, rows * FP8_BLOCK - weight.shape[-2])
    padded = pad(weight, ragged) if any(ragged) else weight
    blocks = padded.reshape(*weight.shape[:-2], rows, FP8_BLOCK, columns, FP8_BLOCK)
    amax = blocks.abs().amax(dim=(-1, -3)).to(torch.float32)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("FP8 cannot store NaN or Inf")
    # 448 = 0.875 * 2^9, so amax / 448 <= 2^k from k = e - 9 on if amax's fraction is at most 0.875, else one later.
    fraction, exponent = torch.frexp(amax)
    k = exponent - 9 + (fraction > 0.875).to(torch.int32)
    return torch.where(amax == 0, 1.0, power_of_two(k.clamp(-126, 127)))
