"""Schemes that `schemes.py` has no closed form for, as compressed-tensors itself has them.

What a linear stores is asked of it: a meta linear is initialized for the scheme and compressed. A weight is encoded and
decoded by its compressor. Importing it costs seconds, so that is left until an artifact needs it.

Source: compressed-tensors 0.19 `quantization/lifecycle/initialize.py`, `compressors/*/base.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loguru import logger

from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.layout import Shape
from dsv4q.verify.schemes import (
    E4M3,
    INT,
    Fault,
    Refused,
    Stored,
    StoredScheme,
    ValueGrid,
    another_shape,
    integer_grid,
    none_may,
)

if TYPE_CHECKING:
    from torch import Tensor

_E8M0_NAN = 0xFF
_REFUSALS = (ValueError, KeyError, NotImplementedError, RuntimeError, TypeError, AssertionError, IndexError)
"""What compressed-tensors raises of a scheme or shape that it cannot do; pydantic's ValidationError is a ValueError."""
_FAILURES = (ValueError, KeyError, NotImplementedError, TypeError, AssertionError, IndexError)
"""The same of values; a RuntimeError may be want of memory."""


@dataclass(frozen=True)
class LibraryScheme(StoredScheme):
    """A scheme that compressed-tensors encodes and decodes."""

    library: Any
    """Its `QuantizationScheme`."""
    known: dict[Shape, Stored] = field(default_factory=dict, compare=False)

    @property
    def weights(self) -> Any:
        """Its `QuantizationArgs` of the weight."""
        return self.library.weights

    @property
    def input_arguments(self) -> Any:
        return self.library.input_activations

    @property
    def _compressor(self) -> Any:
        from compressed_tensors.compressors import BaseCompressor

        return BaseCompressor.get_value_from_registry(self.format)

    @property
    def grid(self) -> ValueGrid | None:
        weights = self.weights
        if not weights.symmetric or weights.strategy not in ("tensor", "channel", "group"):
            return None
        if self.format.startswith("mx") or (weights.type == "float" and weights.num_bits != 8):
            return None
        return E4M3 if weights.type == "float" else integer_grid(weights.num_bits)

    def misfit(self, shape: Shape) -> str | None:
        try:
            self.stored(shape)
        except Refused as error:
            return str(error)
        return None

    def stored(self, shape: Shape) -> Stored:
        """What compressed-tensors stores of a BF16 linear [out, in].

        Raises:
            Refused: nothing; the shape does not fit, or no compressor has this scheme.
        """
        if shape not in self.known:
            logger.disable("compressed_tensors")  # it warns of ragged blocks, which are as they must be or told
            try:
                self.known[shape] = self._ask(shape)
            except _REFUSALS as error:
                raise Refused(_line(error)) from error
            finally:
                logger.enable("compressed_tensors")
        return self.known[shape]

    def _ask(self, shape: Shape) -> Stored:
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
        from compressed_tensors.quantization import initialize_module_for_quantization
        from compressed_tensors.utils import get_direct_state_dict

        self._check_unseen(shape)
        names = {theirs: ours for ours, theirs in torch_dtypes().items()}
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=torch.bfloat16)
        initialize_module_for_quantization(linear, self.library)
        state = get_direct_state_dict(linear)
        found = self._compressor.compress(state, self.library)
        stored: Stored = {k: ((names[v.dtype],), tuple(v.shape)) for k, v in found.items() if v is not None}
        if self.format == INT and not self.weights.symmetric and self.weights.strategy in ("group", "channel"):
            # The compressor packs these along the rows, but not where tensors are on meta.
            zero_point = torch.zeros(state["weight_zero_point"].shape, dtype=torch.int8)
            packed = pack_to_int32(zero_point, self.weights.num_bits, packed_dim=0)
            stored["weight_zero_point"] = (("I32",), tuple(packed.shape))
        return stored

    def _check_unseen(self, shape: Shape) -> None:
        """What the compressor refuses of real tensors, but not of meta ones."""
        size = self.weights.group_size
        if size is not None and size > 0 and shape[1] % size:
            raise ValueError(f"{shape[1]} columns are no multiple of the group size {size}")
        if self.format == INT and self.weights.num_bits > 8:
            raise ValueError(f"integers of {self.weights.num_bits} bits are not packed; 8 at most")

    def decode(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything as the compressor takes it: `weight` F32 [out, in], scales and zero points unpacked.

        Scales are raised to F32 first, so that the weight is not rounded to BF16 on the way.
        """
        state = dict(stored)
        if state["weight_scale"].is_floating_point():
            state["weight_scale"] = state["weight_scale"].float()
        try:
            decoded: dict[str, Tensor] = self._compressor.decompress(state, self.library)
        except _FAILURES as error:
            raise Refused(_line(error)) from error
        return decoded | {"weight": decoded["weight"].float()}

    def encode(self, weight: Tensor, decoded: Mapping[str, Tensor], *, keep_negative_zero: bool) -> dict[str, Tensor]:
        """Weight, scales and zero points.

        While a model is calibrated the compressor adds a zero point of 0 even to symmetric weights, which turns -0
        into +0.
        """
        import torch

        state = {**decoded, "weight": weight}
        if decoded["weight_scale"].dtype == torch.float32:
            # Back to what is stored: the quotient is rounded to the promoted dtype.
            state["weight_scale"] = decoded["weight_scale"].to(torch.bfloat16)
        if self.weights.symmetric and not keep_negative_zero:
            state["weight_zero_point"] = torch.zeros_like(state["weight_scale"], dtype=self.weights.zp_dtype)
        try:
            encoded: dict[str, Tensor] = self._compressor.compress(state, self.library)
        except _FAILURES as error:
            raise Refused(_line(error)) from error
        return encoded

    def numbers(self, scale: Tensor) -> Tensor:
        """E8M0 has no sign, no zero and no infinity."""
        import torch

        number = scale.float()
        if scale.dtype != torch.uint8:
            return number
        return torch.exp2(number - 127).masked_fill(scale == _E8M0_NAN, float("nan"))

    def value_tensors(self, suffixes: Collection[str]) -> tuple[str, ...]:
        return tuple(suffix for suffix in suffixes if not suffix.endswith("scale"))

    def undecodable(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[Fault]:
        if self.format == INT:
            yield from another_shape(stored, shape)

    def impossible(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[Fault]:
        import torch

        narrow = self.weights.type == "int" and self.weights.num_bits < 8
        half = 1 << (self.weights.num_bits - 1)
        for suffix in self.value_tensors(stored):
            tensor = stored[suffix]
            if tensor.is_floating_point():
                yield from none_may(suffix, tensor.float().isnan(), "values without NaN", "NaN")
            if tensor.dtype == torch.int8 and narrow:
                outside = (tensor < -half) | (tensor >= half)
                yield from none_may(suffix, outside, f"integers of {self.weights.num_bits} bits", "out of range")


def library_scheme(name: str, kind: str, group: Mapping[str, Any]) -> LibraryScheme:
    """A config group as compressed-tensors reads it.

    Raises:
        Refused: it does not.
    """
    from compressed_tensors.quantization import QuantizationScheme

    fields = {key: group.get(key) for key in ("targets", "weights", "input_activations")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of group sizes that differ: a matter of the consumer's speed
            scheme = QuantizationScheme.model_validate({**fields, "format": kind})
    except _REFUSALS as error:
        raise Refused(_line(error)) from error
    weights = scheme.weights
    return LibraryScheme(name, kind, weights.num_bits, weights.group_size, scheme.input_activations is not None, scheme)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
