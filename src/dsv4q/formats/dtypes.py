"""What numbers are called and how they lie in memory. torch is imported where it is used: tables alone cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""By code: sign << 3 | index. The bounds of the judge (`verify/bounds.py`) have the grid's steps of their own, so that
they hold an encoder that uses this table to account."""

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""safetensors' names -> torch's; `layout.DTYPE_BYTES` has their sizes."""


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """safetensors' names of dtypes -> torch's dtypes, of those that this torch has."""
    import torch

    return {name: getattr(torch, own) for name, own in _TORCH_NAMES.items() if hasattr(torch, own)}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, row-major, as bytes; a copy only if it lies on a device or is not contiguous."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


@cache
def e2m1_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256, 2] of a float dtype: the two values of every byte of E2M1 codes, that of the low nibble first."""
    import torch

    table = torch.tensor(E2M1_VALUES, dtype=dtype)
    byte = torch.arange(256)
    return torch.stack((table[byte & 15], table[byte >> 4]), dim=-1).to(device)
