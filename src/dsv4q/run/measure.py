"""What quantization did to a weight: decode what was stored and compare it with the source."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv4q.formats.encode import fp8_block_decode, int_group_decode, nvfp4_decode
from dsv4q.formats.error import Errors, TensorError
from dsv4q.model.upstream import decode_state, scheme_of
from dsv4q.recipe.schemes import FLOAT, NVFP4, PACKED_INT


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, row-major, as bytes; a copy only if it lies on a device or is not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def decoded(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """F32 [T, out, in] that the stored tensors of T linears under the scheme of `module` stand for."""
    scheme = scheme_of(module)
    form, weights = str(getattr(scheme.format, "value", scheme.format)), scheme.weights
    if form == NVFP4:
        return nvfp4_decode(state["weight_packed"], state["weight_scale"], state["weight_global_scale"])
    if form == FLOAT and weights.block_structure == [128, 128]:
        return fp8_block_decode(state["weight"], state["weight_scale"])
    if form == PACKED_INT and weights.symmetric and weights.group_size and weights.num_bits in (4, 8):
        return int_group_decode(state["weight_packed"], state["weight_scale"], weights.num_bits, weights.group_size)
    count = next(iter(state.values())).shape[0]
    alone = ({name: value[index] for name, value in state.items()} for index in range(count))
    return torch.stack([decode_state(module, one).to(torch.float32) for one in alone])


def add_errors(errors: Errors, names: Sequence[str], sums: torch.Tensor) -> None:
    """Count T tensors; `sums` as `encode.error_sums` gives them."""
    for name, numbers in zip(names, sums.tolist(), strict=True):
        errors.add(name, TensorError(*numbers))
