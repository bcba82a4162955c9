"""Where a kernel of ours pays, on a GPU or a CPU: each has an eager twin with the same bits, which runs elsewhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsv4q.formats.compare import error_sums, no_error
from dsv4q.formats.encode import (
    FP8_BLOCK,
    NVFP4_GROUP,
    TILE,
    WINDOW,
    fp8_block_decode,
    fp8_block_encode,
    nvfp4_decode,
    nvfp4_encode,
)


@cache
def _triton() -> ModuleType | None:
    """Our Triton kernels, where Triton is installed and finds the C compiler that it builds its launchers with."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if importlib.util.find_spec("triton") is None or compiler is None or os.environ.get("DSV4Q_EAGER"):
        return None
    from dsv4q.formats import triton_kernels

    return triton_kernels


@cache
def cpu_kernels() -> ModuleType | None:
    """Our Numba kernels, where Numba is installed (`pip install dsv4q[cpu]`); None: eager code has to do."""
    if importlib.util.find_spec("numba") is None or os.environ.get("DSV4Q_EAGER"):
        return None
    from dsv4q.formats import cpu_kernels as kernels

    return kernels


_ELEMENTS = 1 << 21
"""Work enough for a thread."""


def on_threads(kernel: Callable[..., Any], pieces: Iterable[Sequence[Tensor]]) -> list[Any]:
    """What a kernel of the CPU returns for each piece of work, its arguments, on as many threads as torch has here."""
    work = [[tensor.numpy() for tensor in piece] for piece in pieces]
    threads = min(torch.get_num_threads(), len(work))
    if threads <= 1:
        return [kernel(*piece) for piece in work]
    with ThreadPoolExecutor(threads, "dsv4q-kernel") as pool:
        return list(pool.map(lambda piece: kernel(*piece), work))


def in_bands(whole: Sequence[Tensor], heights: Sequence[int]) -> Iterable[Sequence[Tensor]]:
    """Matrices cut into bands that belong together; one row of each stands for so many of the weight."""
    columns, height = max(part.shape[-1] for part in whole), max(heights)
    rows = max(1, _ELEMENTS // max(1, columns * height)) * height
    return zip(*(part.split(rows // each) for part, each in zip(whole, heights, strict=True)), strict=True)


@cache
def _is_new_enough(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _for(*tensors: Tensor) -> ModuleType | None:
    """The kernels, if these tensors are ones they take: BF16 in order on an NVIDIA GPU of Ampere or newer."""
    if not tensors[0].is_cuda or not _is_new_enough(tensors[0].device):
        return None
    if not all(t.dtype is torch.bfloat16 and t.is_contiguous() for t in tensors):
        return None
    return _triton()


def nvfp4_grid_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Lower, upper and amax of `exact.nvfp4_grid`, or None where eager code has to find them."""
    kernels = _for(weight)
    if kernels is None:
        return None
    lower, upper, amax, odd = kernels.grid(weight)
    return None if int(odd) else (lower, upper, amax)


@torch.no_grad()
def nvfp4_exact(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Of weights all of whose blocks are on the grid, everything at once; None where eager code has to do it.

    Args:
        weight: BF16 [T, P, M, N], N a multiple of 16; the P of one T share a global scale.

    Returns:
        U8 [T, P, M, N/2]; block scales as E4M3 codes, U8 [T, P, M, N/16]; exponents of the global scales, I32 [T]; sums
        of the squares of all values, F64 [T, P]; and I32 [T], above zero where a block is off the grid or out of the
        window, or a value subnormal or no number: then the others are not valid. The bytes are those of
        `exact.nvfp4_scales` and `encode.nvfp4_encode`, zeros keep their sign.
    """
    kernels = _for(weight) if weight.shape[-1] % NVFP4_GROUP == 0 else None
    if kernels is None:
        return None
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.nvfp4_exact(weight, *WINDOW)
    return found


@torch.no_grad()
def nvfp4_encode_measured(
    weight: Tensor, block_scale: Tensor, global_scale: Tensor, *, keep_negative_zero: bool
) -> tuple[Tensor, Tensor]:
    """Round weights to E2M1 under given scales, and measure what that costs.

    Args:
        weight: BF16 [T, M, N], N a multiple of 16.
        block_scale: F32 [T, M, N/16], values that E4M3 has.
        global_scale: F32 [T], divisors.
        keep_negative_zero: see `encode.nvfp4_encode`.

    Returns:
        U8 [T, M, N/2], and F64 [T, 4] as `compare.error_sums` gives them. On a GPU the sums of squares may differ from
        the eager ones in their last bits, for they are added in another order.
    """
    kernels = _for(weight)
    if kernels is not None:
        found: tuple[Tensor, Tensor] = kernels.nvfp4_encode_measured(
            weight, block_scale.contiguous(), global_scale.contiguous(), keep_negative_zero
        )
        return found
    if weight.is_cuda:
        return _encode_measured(weight, block_scale, global_scale, keep_negative_zero)
    return _encode_measured_in_tiles(weight, block_scale, global_scale, keep_negative_zero)


def _encode_measured(weight: Tensor, block_scale: Tensor, global_scale: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    packed = nvfp4_encode(weight, block_scale, global_scale, keep_negative_zero=keep)
    return packed, error_sums(weight, nvfp4_decode(packed, block_scale, global_scale))


def _encode_measured_in_tiles(
    weight: Tensor, block_scale: Tensor, global_scale: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Several small tensors at a time, or some rows of a large one."""
    tensors, rows, columns = weight.shape
    packed = torch.empty(tensors, rows, columns // 2, dtype=torch.uint8)
    sums = torch.zeros(tensors, 4, dtype=torch.float64)
    equal = torch.zeros(tensors, dtype=torch.float64)  # elements: shares of them would not add up to 1 exactly
    together, step = max(1, TILE // (rows * columns)), max(1, TILE // columns)
    for t in range(0, tensors, together):
        some = slice(t, t + together)
        for row in range(0, rows, step):
            part = (some, slice(row, row + step))
            packed[part], found = _encode_measured(weight[part], block_scale[part], global_scale[some], keep)
            equal[some] += (found[:, 0] * weight[part][0].numel()).round()
            sums[some, 1:3] += found[:, 1:3]
            sums[some, 3] = torch.maximum(sums[some, 3], found[:, 3])
    sums[:, 0] = equal / (rows * columns)
    return packed, sums


@torch.no_grad()
def fp8_block_encode_measured(weight: Tensor, block_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to E4M3 under given 128x128 block scales, and measure what that costs.

    Args:
        weight: BF16 [M, N].
        block_scale: BF16 or F32 multiplier [ceil(M/128), ceil(N/128)], positive.

    Returns:
        F8_E4M3 [M, N] as of `encode.fp8_block_encode`, and F64 [4] as `compare.error_sums` gives them.
    """
    exact = _fp8_block_encode_exact(weight, block_scale)
    if exact is not None:
        return exact, no_error(_squares(weight))[0]
    codes = fp8_block_encode(weight, block_scale)
    return codes, error_sums(weight[None], fp8_block_decode(codes, block_scale)[None])[0]


def _fp8_block_encode_exact(weight: Tensor, block_scale: Tensor) -> Tensor | None:
    """The codes, if a kernel finds that nothing is rounded."""
    kernels = None if weight.is_cuda or weight.dtype is not torch.bfloat16 else cpu_kernels()
    mantissa, exponent = torch.frexp(block_scale)
    if kernels is None or not bool((mantissa == 0.5).all()):
        return None
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    whole = weight.contiguous().view(torch.uint16), exponent.to(torch.int64) - 1, codes
    pieces = in_bands(whole, (1, FP8_BLOCK, 1))
    found = on_threads(kernels.fp8_encode, ((bits, under, _e4m3_codes(), to) for bits, under, to in pieces))
    return codes.view(torch.float8_e4m3fn) if all(found) else None


@cache
def _e4m3_codes() -> Tensor:
    """I16 [65536]: the E4M3 code of BF16's bits, -1 where there is none."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).to(torch.float32)
    codes = values.to(torch.float8_e4m3fn)
    same = (codes.to(torch.float32) == values) & values.isfinite()
    return codes.view(torch.uint8).to(torch.int16).masked_fill(~same, -1)


def _squares(weight: Tensor) -> Tensor:
    """F64 [1], as `error_sums` adds them up."""
    return weight.to(torch.float32)[None].square().sum(dim=(1, 2), dtype=torch.float64)


@torch.no_grad()
def mxfp4_decode(packed: Tensor, scale: Tensor, out: Tensor) -> bool:
    """Dequantize MXFP4 into BF16 [..., M, N], or say no where eager code (`native.decode_into`) has to.

    Args:
        packed: U8 or I8 [..., M, N/2], contiguous.
        scale: F8_E8M0 or U8 [..., M, N/32], contiguous.
    """
    kernels = _for(out) if out.shape[-1] % 32 == 0 and packed.is_contiguous() and scale.is_contiguous() else None
    if kernels is None:
        return False
    kernels.mxfp4_decode(packed.view(torch.uint8), scale.view(torch.uint8), out)
    return True


SWIGLU_BLOCK = 4096
"""Elements of which one block of a GPU computes the gate, and finds the ends."""


def swiglu_parts(elements: int) -> int:
    """P of `swiglu` for a result of so many elements, or of fewer; a multiple of 16, so that all ends lie aligned."""
    return -(-elements // (16 * SWIGLU_BLOCK)) * 16


def swiglu(gate: Tensor, up: Tensor, limit: float, ends: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) of an expert, written into `gate`; `up` is consumed too.

    Args:
        gate, up: BF16 [tokens, F].
        ends: F32 [2, P] in order, receives the smallest elements of parts of the result in its first row and the
            largest in its second, NaN where one is NaN; what it does not need stays as it is. P: `swiglu_parts`. Who
            has many results asks for the ends of all parts of all of them at once.

    Source of the formula: `DeepseekV4Experts._apply_gate` of transformers, rounded to BF16 at the same places.
    """
    kernels = _for(gate, up)
    if kernels is not None:
        if ends is None:
            ends = torch.empty(2, swiglu_parts(gate.numel()), dtype=torch.float32, device=gate.device)
        found: Tensor = kernels.swiglu(gate, up, limit, ends, SWIGLU_BLOCK)
        return found
    hidden = torch.nn.functional.silu(gate.clamp_(max=limit), inplace=True).mul_(up.clamp_(min=-limit, max=limit))
    if ends is not None:
        ends[:, 0] = torch.stack(torch.aminmax(hidden))
    return hidden


def import_for(device: torch.device) -> None:
    """Import Triton on this thread if the device wants it, for other libraries import it too."""
    if device.type == "cuda":
        _triton()


def warm_up(device: torch.device) -> None:
    """Have the kernels compiled before a run wants them: a second or two, while it reads its first block.

    Triton compiles for kinds of arguments: here as in a run all sizes are multiples of 16, and all pointers aligned.
    """
    weight = torch.ones((16, 256, 256), dtype=torch.bfloat16, device=device)
    if _for(weight) is None:
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        packed, scale = (torch.zeros((16, 256, n), dtype=torch.uint8, device=device) for n in (128, 8))
        mxfp4_decode(packed, scale, torch.empty_like(weight))
        nvfp4_grid_bits(weight)
        scales, one = (torch.ones(shape, dtype=torch.float32, device=device) for shape in ((16, 256, 16), (16,)))
        for shared in (1, 2):
            nvfp4_exact(weight.unflatten(0, (-1, shared)))
        for keep in (True, False):
            nvfp4_encode_measured(weight, scales, one, keep_negative_zero=keep)
        swiglu(weight[0], weight[1], 10.0)
        torch.cuda.current_stream(device).synchronize()
