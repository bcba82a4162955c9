"""What its smallest and its largest element tell of a finite tensor: nothing but zeros, a value that no model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dsv4q.errors import WeightError
from dsv4q.layout import TensorSpec

LARGEST = 2.0**63
"""The square of what is larger is beyond F32, in which kernels and norms add squares up."""


def check_values(specs: Sequence[TensorSpec], ends: torch.Tensor, where: Callable[[TensorSpec], str]) -> None:
    """Refuse weights and norms that are not a model's.

    Zeros are what a download leaves that was stopped after its space was allocated. One huge value, which a single
    wrong bit makes, takes the whole range of a scale for itself: every weight under the same scale is stored as zero.

    Args:
        ends: F32 [n, 2], smallest and largest element of each tensor, finite.
        where: names a tensor for people.

    Raises:
        WeightError: the first such tensor.
    """
    sizes = ends.abs().amax(dim=1)
    odd = (sizes == 0) | (sizes > LARGEST)
    for at in odd.nonzero().flatten().tolist() if bool(odd.any()) else ():
        spec, size = specs[at], float(sizes[at])
        if not spec.name.endswith(".weight"):
            continue  # a bias may be zero, or as good as infinite
        if size == 0:
            raise WeightError(
                "A source tensor is nothing but zeros",
                where=where(spec),
                expected=f"the values of a {spec.role}",
                found=f"{spec.dtype} {list(spec.shape)}, all zero",
                hint="a stopped download leaves zeros: get this shard again, or check its SHA-256",
            )
        raise WeightError(
            "A source tensor has a value that no model has",
            where=where(spec),
            expected=f"magnitudes up to {LARGEST:.3g}, whose squares F32 can hold",
            found=f"{size:.4g}; every weight under the same scale would be stored as zero",
            hint="get this shard again, or check its SHA-256",
        )
