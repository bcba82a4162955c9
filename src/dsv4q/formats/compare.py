"""What differs between values and those that they stand for, as `error.TensorError` counts it: any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4q.formats.error import TensorError

_WIDE = (torch.float64, torch.int64, torch.int32, torch.uint64, torch.uint32)
"""Dtypes that F32 does not hold."""


@torch.no_grad()
def error_sums(weights: Tensor, stored: Tensor) -> Tensor:
    """What storing did to each of T tensors: `weights` of the source and `stored` F32, both [T, out, in].

    Returns:
        F64 [T, 4]: the fields of `error.TensorError` in their order.
    """
    reference = weights.to(torch.float32)
    # Bits, not values: a -0 that became +0 is not the source's element.
    same = (stored.view(torch.int32) == reference.view(torch.int32)).flatten(1).sum(dim=1)
    squares = reference.square().sum(dim=(1, 2), dtype=torch.float64)
    if not weights.is_cuda and int(same.sum()) == reference.numel():
        return no_error(squares)
    difference = stored - reference
    return torch.stack(
        [
            same.to(torch.float64) / reference[0].numel(),
            difference.square().sum(dim=(1, 2), dtype=torch.float64),
            squares,
            difference.abs().amax(dim=(1, 2)).to(torch.float64),
        ],
        dim=1,
    )


def no_error(squares: Tensor) -> Tensor:
    """F64 [..., 4]: the same of weights that are stored exactly, of the sums of their squares [...]."""
    none = torch.zeros_like(squares, dtype=torch.float64)
    return torch.stack([none + 1, none, squares.to(torch.float64), none], dim=-1)


def tensor_error(weight: Tensor, stored: Tensor) -> TensorError:
    """The same of one tensor, `weight` of the source and `stored` F32, both [out, in]; each square is F64 already."""
    reference = weight.to(torch.float32)
    exact = int((stored.view(torch.int32) == reference.view(torch.int32)).sum()) / reference.numel()
    difference = stored - reference
    return TensorError(exact, _squares(difference), _squares(reference), float(difference.abs_().amax()))


class Comparison:
    """One tensor against another of any dtype, filled piece by piece. Nothing is refused: NaN and Inf are counted."""

    def __init__(self) -> None:
        self.values = 0
        self.unequal = 0
        """Of another number; a NaN where the other has a NaN too is not counted."""
        self.zero_signs = 0
        """0 on one side and -0 on the other: equal numbers."""
        self.not_finite = 0
        """Unequal ones of which one is NaN or infinite; they are in no sum."""
        self._squared_error = 0.0
        self._squared_reference = 0.0
        self._max_abs_error = 0.0

    @property
    def error(self) -> TensorError:
        """Of all pieces, of which there is one at least."""
        exact = (self.values - self.unequal - self.zero_signs) / self.values
        return TensorError(exact, self._squared_error, self._squared_reference, self._max_abs_error)

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count two pieces of the same shape."""
        kind = torch.float64 if reference.dtype in _WIDE or other.dtype in _WIDE else torch.float32
        mine, yours = reference.to(kind), other.to(kind)
        self.values += mine.numel()
        error = mine - yours
        squares, squared_error = _squares(mine), _squares(error)
        if not math.isfinite(squares + squared_error):
            mine, yours, error = self._without_odd_ones(mine, yours)
            squares, squared_error = _squares(mine), _squares(error)
        self._squared_reference += squares
        self._squared_error += squared_error
        if reference.is_floating_point() or other.is_floating_point():
            unequal = int(torch.count_nonzero(error))
            raw = torch.int64 if kind == torch.float64 else torch.int32
            # Of equal numbers only zeros have several representations.
            self.zero_signs += int(torch.count_nonzero(mine.view(raw) ^ yours.view(raw))) - unequal
        else:
            unequal = int(torch.count_nonzero(reference.to(torch.int64) != other.to(torch.int64)))
        self.unequal += unequal
        if unequal:
            self._max_abs_error = max(self._max_abs_error, *(abs(float(end)) for end in torch.aminmax(error)))

    def _without_odd_ones(self, mine: Tensor, yours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both and their difference, 0 where one is NaN or infinite; those are counted."""
        odd = ~(mine.isfinite() & yours.isfinite())
        found = int((odd & (mine != yours) & ~(mine.isnan() & yours.isnan())).sum())
        self.unequal += found
        self.not_finite += found
        mine, yours = mine.masked_fill(odd, 0), yours.masked_fill(odd, 0)
        return mine, yours, mine - yours


def _squares(values: Tensor) -> float:
    """Sum of squares in F64."""
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm * norm
