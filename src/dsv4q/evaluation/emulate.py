"""Artifact linears as the consumer's kernels compute them: decoded weights, and inputs rounded on the way in.

The kernel multiplies low-precision weights by low-precision inputs and adds up in F32. Here both are rounded the same
way, written out as BF16, and multiplied by an ordinary linear, so the errors are the kernel's and the speed is not.

NVFP4 inputs: one E4M3 scale per 16 values, made from their largest magnitude under the calibrated global scale G (a
divisor), scale = e4m3(amax / 6 * G), clipped at 448; values are E2M1 in units of scale / G. The consumer has one G for
all experts of a layer, the one of the widest range (contract of vLLM's `flashinfer_fp4_moe.py`: the largest 1 / G), so
w1 and w3 of a layer share the smallest G, and w2 of a layer another.

FP8 inputs: E4M3 values, one scale per token and 128 values, 2^ceil(log2(amax / 448)): the consumer's FP8 kernels
(DeepGEMM) take E8M0 scales on the GPUs that this format is for. For the same reason the consumer rounds an attention
weight anew, at load, whose block scales are no powers of two; so does `kernel_weight`.

Left out, for no kernel of the consumer is open to a comparison of bits: the order of additions, the FP8 key-value
cache, and its own choice of precision in the compressor and the indexer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4q.errors import SourceError
from dsv4q.formats.encode import E2M1_MAX, E4M3_MAX, NVFP4_GROUP, fp8_block_decode, fp8_block_encode
from dsv4q.formats.exact import fp8_block_scales, round_e2m1
from dsv4q.layout import Role, TensorSpec
from dsv4q.verify.schemes import NVFP4, Refused, StoredScheme

Quantizer = Callable[[Tensor], Tensor]
"""A linear's input [..., N] -> the values that the kernel multiplies, same shape and dtype."""

FP8_GROUP = 128
_STATIC = ("input_scale", "input_zero_point", "input_global_scale")


# ------------------------------------------------------------------------------------------------ weights


@torch.no_grad()
def kernel_weight(scheme: StoredScheme, stored: Mapping[str, Tensor]) -> Tensor:
    """BF16 [out, in] that the kernel multiplies, of a linear's stored tensors by suffix.

    Raises:
        SourceError: compressed-tensors cannot decode what is stored.
    """
    try:
        values = scheme.decode(stored)["weight"]
    except Refused as error:
        raise SourceError(
            "compressed-tensors cannot decode a linear", where=f"config_groups.{scheme.group}", found=error
        ) from error
    return (_served_fp8(values, stored["weight_scale"]) if scheme.in_squares else values).to(torch.bfloat16)


def _served_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """F32 [out, in]: as stored if every block scale is a power of two, else rounded anew under such scales."""
    fraction, _ = torch.frexp(scale.to(torch.float32))
    if bool((fraction == 0.5).all()):
        return values
    served = fp8_block_scales(values)
    return fp8_block_decode(fp8_block_encode(values, served), served)


# ------------------------------------------------------------------------------------------------ inputs


@torch.no_grad()
def nvfp4_input(x: Tensor, global_scale: Tensor) -> Tensor:
    """Round an input [..., N] (N a multiple of 16) to NVFP4 under a global scale F32 [1] or []; dtype kept."""
    groups = torch.unflatten(x, -1, (-1, NVFP4_GROUP)).to(torch.float32)
    amax = groups.abs().amax(dim=-1, keepdim=True)
    scale = (amax / E2M1_MAX * global_scale).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
    unit = scale / global_scale
    # A group whose scale is below E4M3's range is stored as zeros.
    rounded = round_e2m1(torch.where(unit > 0, groups / unit, 0.0))
    return rounded.mul_(unit).flatten(-2).to(x.dtype)


@torch.no_grad()
def fp8_input(x: Tensor) -> Tensor:
    """Round an input [..., N] to E4M3 with one power-of-two scale per token and 128 values; dtype kept."""
    columns = x.shape[-1]
    padded = pad(x, (0, -columns % FP8_GROUP))
    groups = torch.unflatten(padded, -1, (-1, FP8_GROUP)).to(torch.float32)
    # amax = fraction * 2^exponent, and 448 = 0.875 * 2^9.
    fraction, exponent = torch.frexp(groups.abs().amax(dim=-1, keepdim=True))
    power = (exponent - 9 + (fraction > 0.875)).clamp_(-126, 127).to(torch.int32)
    scale = ((power + 127) << 23).view(torch.float32)
    rounded = (groups / scale).to(torch.float8_e4m3fn).to(torch.float32)
    return rounded.mul_(scale).flatten(-2)[..., :columns].to(x.dtype)


def shares_input_scale(spec: TensorSpec) -> str:
    """Name of the group of linears of a block that the consumer runs under one input global scale."""
    projection = spec.module.rpartition(".")[2]
    if spec.role == Role.ROUTED_EXPERT:
        return "experts w2" if projection == "w2" else "experts w1, w3"
    return "wq_a, wkv" if projection in ("wq_a", "wkv") else spec.module


def quantizer(scheme: StoredScheme, stored: Mapping[str, Tensor], global_scale: Tensor | None) -> Quantizer | None:
    """What happens to the inputs of a linear; None: nothing (weight-only).

    Args:
        stored: the linear's tensors by suffix; static scales of schemes that compressed-tensors knows are in there.
        global_scale: of the whole group of `shares_input_scale`, F32 [1]; NVFP4 only.
    """
    if scheme.input_arguments is not None:
        kept = {name: stored[name] for name in _STATIC if name in stored}
        return lambda x: _by_library(scheme, kept, x)
    if scheme.in_squares:
        return fp8_input
    if scheme.format == NVFP4 and scheme.input_scale:
        assert global_scale is not None
        scale = global_scale
        return lambda x: nvfp4_input(x, scale)
    return None


def rounds_inputs(scheme: StoredScheme) -> bool:
    """Whether `quantizer` gives something for this scheme."""
    return scheme.input_arguments is not None or scheme.in_squares or (scheme.format == NVFP4 and scheme.input_scale)


def calibrated_limit(scheme: StoredScheme, stored: Mapping[str, Tensor], global_scale: Tensor | None) -> Tensor | None:
    """Largest magnitude F32 [1] of a linear's inputs that its calibrated scale represents; larger ones are clipped.

    None: no scale of its inputs was calibrated, or one that is not symmetric and of the whole tensor. Arguments:
    `quantizer`.
    """
    arguments = scheme.input_arguments
    if arguments is None:
        return None if global_scale is None else E2M1_MAX * E4M3_MAX / global_scale
    if "input_global_scale" in stored:
        return E2M1_MAX * E4M3_MAX / stored["input_global_scale"].to(torch.float32).reshape(1)
    scale = stored.get("input_scale")
    if arguments.dynamic or not arguments.symmetric or scale is None or scale.numel() != 1:
        return None
    from compressed_tensors.quantization.utils import calculate_range

    largest: Tensor = calculate_range(arguments, str(scale.device))[1].to(torch.float32) * scale.reshape(1)
    return largest


def _by_library(scheme: StoredScheme, kept: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """compressed-tensors' own rounding, for schemes that are not written down here."""
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = scheme.input_arguments
    tokens = x.reshape(1, -1, x.shape[-1])  # its strategy "token" counts two leading dimensions
    if not tokens.numel():
        return x
    divisor = kept.get("input_global_scale")
    try:
        if args.dynamic:
            scale, zero_point = compute_dynamic_scales_and_zp(tokens, args, torch.nn.Identity(), divisor)
        else:
            scale, zero_point = kept["input_scale"], kept.get("input_zero_point")
        rounded: Tensor = fake_quantize(tokens, scale, zero_point, args, global_scale=divisor)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(
            "compressed-tensors cannot round the inputs of a linear",
            where=f"config_groups.{scheme.group}.input_activations",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return rounded.reshape(x.shape).to(x.dtype)
