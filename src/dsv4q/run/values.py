"""Values that a model cannot have: NaN, nothing but zeros, one beyond all others."""

from __future__ import annotations

import torch

from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import WeightError
from dsv4q.layout import TensorSpec

LARGEST = 2.0**63
"""The square of what is larger is beyond F32, in which kernels and norms add squares up."""


def ends_of(tensor: torch.Tensor) -> torch.Tensor:
    """[1, 2], smallest and largest element."""
    return torch.stack(torch.aminmax(tensor))[None]


def are_usual(ends: torch.Tensor) -> torch.Tensor:
    """Of which tensors `check_values` has nothing to say; Bool [n].

    Args:
        ends: [n, 2], smallest and largest element of each, NaN if one is NaN.
    """
    size = ends.to(torch.float32).abs().amax(dim=1)
    return (size > 0) & (size <= LARGEST)


def check_values(source: Checkpoint, spec: TensorSpec, tensor: torch.Tensor, *, sizes: bool = True) -> None:
    """Refuse NaN and Inf, and weights and norms that are not a model's.

    Zeros are what a download leaves that was stopped after its space was allocated. One huge value, which a single
    wrong bit makes, takes the whole range of a scale for itself: every weight under the same scale is stored as zero.

    Args:
        source: that it is of.
        sizes: not NaN and Inf alone.

    Raises:
        WeightError: says what is wrong.
    """
    bad = (~torch.isfinite(tensor)).reshape(-1).nonzero()
    if len(bad):
        raise WeightError(
            "A source tensor has NaN or Inf",
            where=f"{spec.name} in {source.tensors[spec.name].file}",
            expected="finite values",
            found=f"{len(bad)} of {tensor.numel()} values, the first at element {int(bad[0])}",
            hint="get this shard again; finished blocks are kept, and the same command resumes unless the repaired "
            "file looks like another source, in which case --no-resume starts over",
        )
    size = float(tensor.abs().max())
    if not sizes or not spec.name.endswith(".weight"):
        return  # a bias may be zero, or as good as infinite
    if size == 0:
        raise WeightError(
            "A source tensor is nothing but zeros",
            where=f"{spec.name} in {source.tensors[spec.name].file}",
            expected=f"the values of a {spec.role}",
            found=f"{spec.dtype} {list(spec.shape)}, all zero",
            hint="a stopped download leaves zeros: get this shard again, or check its SHA-256",
        )
    if size > LARGEST:
        raise WeightError(
            "A source tensor has a value that no model has",
            where=f"{spec.name} in {source.tensors[spec.name].file}",
            expected=f"magnitudes up to {LARGEST:.3g}, whose squares F32 can hold",
            found=f"{size:.4g}; every weight under the same scale would be stored as zero",
            hint="get this shard again, or check its SHA-256",
        )
