"""Toys on the grid: values of DeepSeek's MXFP4 and FP8, dequantized (`grid_form`) or as published (`native_form`).

Both are made of the same codes and scales, a function of seed and name alone, so that each is the other's
dequantization. The codes come from the plain toy's random weights; blocks of zeros, -0, subnormals, scales larger than
they need be and exponents over many binades are put among them, because the real files have them.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.native import MXFP4, release_form, release_tensors
from dsv4q.formats.dtypes import E2M1_VALUES
from dsv4q.layout import Dims, TensorSpec
from dsv4q.made_up.toy import ToyForm, random_values

if TYPE_CHECKING:
    import numpy as np
    import torch

_BIAS = 127
_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
"""`quantization_config` of the release's config.json."""


def stored_specs(spec: TensorSpec, expert_dtype: str = "fp4") -> tuple[TensorSpec, ...]:
    """The tensors that a native checkpoint has for one tensor of the model: itself, or weight and scale."""
    stored = release_tensors(spec, expert_dtype)
    # Not dataclasses.replace, which takes four times as long: of a whole model there are 69,000.
    rest = spec.role, spec.block, spec.expert
    return tuple(TensorSpec(name, spec.hf_name, dtype, shape, *rest) for name, dtype, shape in stored)


def codes_and_scales(spec: TensorSpec, form: str, dims: Dims, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a quantized tensor.

    Returns:
        MXFP4: U8 [out, in/2] and U8 (E8M0) [out, ceil(in/32)]. FP8: F8_E4M3 [out, in] and U8 (E8M0) by 128x128.
    """
    import numpy as np

    weights = random_values(spec, dims, seed).float().numpy()
    key = hashlib.sha256(f"{seed}:{spec.name}:grid".encode()).digest()[:16]
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return (_mxfp4 if form == MXFP4 else _fp8)(weights, rng)


def _mxfp4(weights: np.ndarray[Any, Any], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    rows, columns = weights.shape
    groups = np.pad(weights, ((0, 0), (0, -columns % 32))).reshape(rows, -1, 32)
    exponent, moved, zero = _exponents(np.abs(groups).max(-1), 6.0, rng, spread=10)
    scaled = np.where(zero[..., None], 0.0, np.abs(np.ldexp(groups, -exponent[..., None])))
    middles = np.array([(a + b) / 2 for a, b in pairwise(E2M1_VALUES[:8])], dtype=np.float32)
    codes = np.searchsorted(middles, scaled).astype(np.uint8) | np.signbit(groups).astype(np.uint8) << 3
    codes = codes.reshape(rows, -1)[:, : columns + columns % 2]
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return torch.from_numpy(packed), torch.from_numpy((moved + _BIAS).astype(np.uint8))


def _fp8(weights: np.ndarray[Any, Any], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    rows, columns = weights.shape
    padded = np.pad(weights, ((0, -rows % 128), (0, -columns % 128)))
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    exponent, moved, zero = _exponents(np.abs(blocks).max((1, 3)), 448.0, rng, spread=4)
    scaled = np.ldexp(blocks, -exponent[:, None, :, None])
    tiny = rng.random(scaled.shape, dtype=np.float32)
    # E4M3's least number is 2^-9: one value in a hundred becomes 0 to 7 of it, zero and the subnormals.
    subnormal = np.copysign(np.floor(tiny * 800) / 512, scaled)
    scaled = np.where(tiny < 0.01, subnormal, scaled)
    scaled = np.where(zero[:, None, :, None], np.copysign(np.float32(0.0), scaled), scaled)
    flat = torch.from_numpy(scaled.reshape(padded.shape)[:rows, :columns].astype(np.float32))
    return flat.to(torch.float8_e4m3fn), torch.from_numpy((moved + _BIAS).astype(np.uint8))


def _exponents(
    amax: np.ndarray[Any, Any], largest: float, rng: np.random.Generator, spread: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """For each block: the exponent to encode it under, the one to store, and whether it becomes zero.

    One block in eight is encoded under 2 or 4 times the scale that it needs; one in eight is stored smaller than it is
    by up to 2^spread; of several blocks, one in sixteen is zero, under any scale.
    """
    import numpy as np

    fraction, exponent = np.frexp(amax / np.float32(largest))
    least = exponent - (fraction == 0.5)
    slack = np.where(rng.random(amax.shape) < 0.125, rng.integers(1, 3, amax.shape), 0)
    shrink = np.where(rng.random(amax.shape) < 0.125, rng.integers(1, spread + 1, amax.shape), 0)
    zero = (rng.random(amax.shape) < 1 / 16) & (amax.size > 1)
    stored = np.where(zero, rng.integers(-100, 100, amax.shape), least + slack - shrink)
    return least + slack, stored, zero


def _stored(spec: TensorSpec, dims: Dims, seed: int, expert_dtype: str) -> tuple[torch.Tensor, ...]:
    import torch

    form = release_form(spec, expert_dtype)
    if form is None:
        return (random_values(spec, dims, seed),)
    codes, scales = codes_and_scales(spec, form, dims, seed)
    weight = codes.view(torch.int8) if form == MXFP4 else codes
    # E8M0 is F32's exponent field
    base = scales.to(torch.int32).bitwise_left_shift_(23).view(torch.float32)
    return weight, scales.view(torch.float8_e8m0fnu) if expert_dtype == "fp4" else base


def _dequantized(spec: TensorSpec, dims: Dims, seed: int, expert_dtype: str) -> tuple[torch.Tensor, ...]:
    from dsv4q.formats.native import fp8_to_bf16, mxfp4_to_bf16

    form = release_form(spec, expert_dtype)
    if form is None:
        return (random_values(spec, dims, seed),)
    decode = mxfp4_to_bf16 if form == MXFP4 else fp8_to_bf16
    return (decode(*codes_and_scales(spec, form, dims, seed), spec.name),)


def grid_form(expert_dtype: str = "fp4") -> ToyForm:
    """A BF16 checkpoint of values on the release's grid. `expert_dtype`: see `release_form`."""
    return ToyForm(
        config={"expert_dtype": expert_dtype},
        stored=lambda spec: (spec,),
        values=lambda spec, dims, seed: _dequantized(spec, dims, seed, expert_dtype),
    )


def native_form(expert_dtype: str = "fp4") -> ToyForm:
    """The same checkpoint as DeepSeek publishes it: codes and scales, and a config.json that says so."""
    return ToyForm(
        config={"expert_dtype": expert_dtype, "quantization_config": _QUANTIZATION},
        stored=lambda spec: stored_specs(spec, expert_dtype),
        values=lambda spec, dims, seed: _stored(spec, dims, seed, expert_dtype),
    )
