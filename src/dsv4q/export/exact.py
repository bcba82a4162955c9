"""Linears of the release encoded once more, to the bytes that a run with the exact observers wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsv4q.checkpoint.native import NativeCheckpoint
from dsv4q.formats.convert import mxfp4_to_nvfp4
from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.formats.encode import fp8_block_encode, nvfp4_encode
from dsv4q.formats.exact import fp8_block_scales, nvfp4_scales
from dsv4q.formats.scalars import to_bytes
from dsv4q.layout import TensorSpec


def fp8_linear(source: NativeCheckpoint, spec: TensorSpec, scale_dtype: str) -> dict[str, bytes]:
    """`weight` and `weight_scale` of a linear as `exact_fp8_block` has them, by name.

    Raises:
        SourceError, WeightError: it cannot be read, or stands for no number.
    """
    weight = source.tensor(spec.name)
    scale = fp8_block_scales(weight).to(torch_dtypes()[scale_dtype])
    stored = {"weight": fp8_block_encode(weight, scale), "weight_scale": scale}
    return {f"{spec.module}.{suffix}": _bytes(tensor) for suffix, tensor in stored.items()}


def nvfp4_expert(
    source: NativeCheckpoint, specs: Sequence[TensorSpec], inputs: Mapping[str, float]
) -> dict[str, bytes]:
    """All tensors of one MXFP4 expert as `exact_nvfp4` has them, by name; w1 and w3 share their global scale.

    Args:
        specs: w1, w2 and w3.
        inputs: projection -> `input_global_scale`.

    Raises:
        SourceError, WeightError: as `fp8_linear`.
    """
    by_projection = {spec.module.rpartition(".")[2]: spec for spec in specs}
    made: dict[str, bytes] = {}
    for together in (("w1", "w3"), ("w2",)):
        stored = [source.stored(by_projection[projection].name) for projection in together]
        codes, scales = (torch.stack(parts)[None] for parts in zip(*stored, strict=True))
        found = mxfp4_to_nvfp4(codes, scales)
        packed, scale, shared = found.packed[0], found.block_scale[0], found.global_scale[0]
        if not bool(found.exact.all()):
            weight = torch.stack([source.tensor(by_projection[projection].name) for projection in together])
            searched = nvfp4_scales(weight[None])
            scale, shared = searched.block_scale[0], searched.global_scale[0]
            packed = nvfp4_encode(weight, scale, shared.expand(len(together)), keep_negative_zero=True)
        for place, projection in enumerate(together):
            module = by_projection[projection].module
            made[f"{module}.weight_packed"] = _bytes(packed[place])
            made[f"{module}.weight_scale"] = _bytes(scale[place].to(torch.float8_e4m3fn))
            made[f"{module}.weight_global_scale"] = _bytes(shared)
            made[f"{module}.input_global_scale"] = to_bytes(inputs[projection])
    return made


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
