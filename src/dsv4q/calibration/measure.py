"""What quantization did to a weight: decode what was stored and compare it with the source."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4q.calibration.encode import fp8_block_decode, int_group_decode, nvfp4_decode
from dsv4q.calibration.upstream import decode_state, scheme_of
from dsv4q.checkpoint.schemes import FLOAT, NVFP4, PACKED_INT


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, row-major, as bytes; a copy only if it lies on a device or is not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def decoded(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """F32 [out, in] that the stored tensors of a linear stand for."""
    scheme = scheme_of(module)
    form, weights = str(getattr(scheme.format, "value", scheme.format)), scheme.weights
    if form == NVFP4:
        return nvfp4_decode(state["weight_packed"], state["weight_scale"], state["weight_global_scale"])
    if form == FLOAT and weights.block_structure == [128, 128]:
        return fp8_block_decode(state["weight"], state["weight_scale"])
    if form == PACKED_INT and weights.symmetric and weights.group_size and weights.num_bits in (4, 8):
        return int_group_decode(state["weight_packed"], state["weight_scale"], weights.num_bits, weights.group_size)
    return decode_state(module, state).to(torch.float32)


@dataclass
class Errors:
    """Error of many tensors of one class, added up."""

    tensors: int = 0
    exact: int = 0
    """Tensors that decode to the source in every element."""
    squared_error: float = 0.0
    squared_weight: float = 0.0
    worst: float = 0.0
    """Largest relative (Frobenius) error of one tensor."""
    worst_tensor: str = ""

    def add(self, names: Sequence[str], weights: torch.Tensor, stored: torch.Tensor) -> None:
        """Count tensors: `weights` of the source and `stored` F32, both [len(names), out, in]."""
        reference = weights.detach().to(torch.float32)
        errors = (stored - reference).square_().sum(dim=(1, 2), dtype=torch.float64).tolist()
        powers = reference.square().sum(dim=(1, 2), dtype=torch.float64).tolist()
        # Bits, not values: a -0 that became +0 is not the source's element.
        same = (stored.view(torch.int32) == reference.view(torch.int32)).flatten(1).all(dim=1).tolist()
        for name, error, power, exact in zip(names, errors, powers, same, strict=True):
            relative = math.sqrt(error / power) if power else (math.inf if error else 0.0)
            self.tensors += 1
            self.exact += exact
            self.squared_error += error
            self.squared_weight += power
            if relative >= self.worst:
                self.worst, self.worst_tensor = relative, name

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Errors:
        return cls(**{key: raw[key] for key in cls.__dataclass_fields__})

    def merge(self, other: Errors) -> None:
        """Add the counts of another set of tensors."""
        self.tensors += other.tensors
        self.exact += other.exact
        self.squared_error += other.squared_error
        self.squared_weight += other.squared_weight
        if other.worst >= self.worst:
            self.worst, self.worst_tensor = other.worst, other.worst_tensor

    @property
    def relative(self) -> float:
        """Relative error of all tensors together."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB; None where there is no noise."""
        return -20 * math.log10(self.relative) if self.relative else None

    def as_dict(self) -> dict[str, Any]:
        """The sums, and what follows from them."""
        sums = {key: getattr(self, key) for key in self.__dataclass_fields__}
        return {**sums, "relative_error": self.relative, "sqnr_db": self.sqnr_db}


@dataclass
class Stopwatch:
    """Seconds by stage of one block."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[name] += time.perf_counter() - begin
