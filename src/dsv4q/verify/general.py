"""Quantized linears in a scheme of `library.py`: the same questions as in `weights.py`, asked of any format.

The bounds on scales hold for symmetric E4M3 and integers. Of every other format it is demanded that the error is not
larger than the weight itself: a grid that has zero, rounded to nearest, cannot be farther off, and another expert's
weight is so by a factor of sqrt(2). What passes nevertheless is a scale wrong by a small factor, encoded anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4q.layout import TensorSpec
from dsv4q.verify.bounds import Blocks, far_elements
from dsv4q.verify.case import Case, place
from dsv4q.verify.config import INT
from dsv4q.verify.library import LibraryScheme, Refused
from dsv4q.verify.result import ErrorStats, TensorError
from dsv4q.verify.weights import Linear, tensor_error

_MOST = 1.0
"""Largest relative error, in Frobenius norms, where no sharper bound is derived."""
_E8M0_NAN = 0xFF


class GeneralLinear(Linear):
    """One quantized linear, encoded and decoded by compressed-tensors."""

    def __init__(self, case: Case, spec: TensorSpec, scheme: LibraryScheme, errors: Mapping[str, ErrorStats]) -> None:
        super().__init__(case, spec, scheme, errors)
        self.library = scheme

    def _scales(self) -> bool:
        """Every scale finite and positive; and the shape, without which nothing can be unpacked."""
        return super()._scales() & self._shape_is_right()

    def _number(self, scale: Tensor) -> Tensor:
        """E8M0 has no sign, no zero and no infinity."""
        number = super()._number(scale)
        if scale.dtype != torch.uint8:
            return number
        return torch.exp2(number - 127).masked_fill(scale == _E8M0_NAN, float("nan"))

    def _packed(self) -> None:
        weights = self.library.weights
        for suffix, tensor in self.stored.items():
            if suffix.endswith("scale"):
                continue
            self.case.log.looked_at("values")
            if tensor.is_floating_point():
                self._none(suffix, tensor.to(torch.float32).isnan(), "values without NaN", "NaN")
            if tensor.dtype == torch.int8 and weights.type == "int" and weights.num_bits < 8:
                half = 1 << (weights.num_bits - 1)
                outside = (tensor < -half) | (tensor >= half)
                self._none(suffix, outside, f"integers of {weights.num_bits} bits", "out of range")

    def _none(self, suffix: str, mask: Tensor, expected: str, kind: str) -> None:
        if bool(mask.any()):
            found = f"{int(mask.sum()):,} of {mask.numel():,} are {kind}, the first at {place(mask)}"
            self.case.differs("values", self.names[suffix], expected, found)

    def _shape_is_right(self) -> bool:
        if self.scheme.format != INT:
            return True
        shape = self.stored["weight_shape"].tolist()
        if shape != list(self.spec.shape):
            self.case.differs("values", self.names["weight_shape"], str(list(self.spec.shape)), str(shape))
        return shape == list(self.spec.shape)

    # ------------------------------------------------------------------------------------ against the source

    def _against_source(self, weight: Tensor) -> None:
        self.case.log.looked_at("encoding")
        try:
            self._decoded_and_encoded(weight)
        except Refused as error:
            name = self.names["weight_scale"]
            self.case.differs("encoding", name, "tensors that compressed-tensors can decode and encode", str(error))

    def _decoded_and_encoded(self, weight: Tensor) -> None:
        decoded = self.library.decode(self.stored)
        full = weight.to(torch.float32)
        unit = decoded["weight_scale"].to(torch.float32).flatten()
        error = tensor_error(full, decoded["weight"], unit)
        self.errors[self.spec.role].add(self.spec.module, error)
        if not self._all_reencode(weight, decoded):
            return
        self.case.log.looked_at("error")
        if self.library.grid is not None:
            self._bounds(full, decoded["weight"], unit, weight.dtype == self.stored["weight_scale"].dtype)
        else:
            self._not_worse_than_nothing(error)

    def _all_reencode(self, weight: Tensor, decoded: Mapping[str, Tensor]) -> bool:
        """Weight, scales and zero points as the compressor stores them, with every -0 kept or with none."""
        found = [self._unequal(weight, decoded, keep) for keep in (True, False)]
        if not all(found):
            return True
        for suffix, (mask, again, stored) in min(
            found, key=lambda one: sum(int(m.sum()) for m, _, _ in one.values())
        ).items():
            self._told(self.names[suffix], mask, again, stored)
        return False

    def _unequal(
        self, weight: Tensor, decoded: Mapping[str, Tensor], keep: bool
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Tensors that differ: where, the source's bytes, the artifact's bytes."""
        encoded = self.library.encode(weight, decoded, keep_negative_zero=keep)
        found = {}
        for suffix, tensor in self.stored.items():
            if not suffix.startswith("weight"):
                continue
            again, stored = (_bytes(one) for one in (encoded[suffix].to(tensor.device), tensor))
            if not torch.equal(again, stored):
                found[suffix] = (again != stored, again, stored)
        return found

    def _bounds(self, full: Tensor, decoded: Tensor, unit: Tensor, bf16: bool) -> None:
        grid = self.library.grid
        assert grid is not None
        columns = full.numel() // unit.numel()
        blocks = Blocks(full.reshape(-1, columns), decoded.reshape(-1, columns), unit)
        far = far_elements(blocks, grid, bf16_quotient=bf16)
        self._far(far, self.names["weight_packed" if "weight_packed" in self.names else "weight"])
        self._scale_choice(blocks, grid)

    def _not_worse_than_nothing(self, error: TensorError) -> None:
        if error.relative <= _MOST:
            return
        name = self.names["weight_packed" if "weight_packed" in self.names else "weight"]
        expected = f"a relative error of at most {_MOST:g}, that of a weight of zeros"
        self.case.differs("error", name, expected, f"{error.relative:.4g}")


def _bytes(tensor: Tensor) -> Tensor:
    """U8 of the same rank; flat in between, because a last dimension of one may have any stride."""
    return tensor.contiguous().flatten().view(torch.uint8).reshape(*tensor.shape[:-1], -1)
