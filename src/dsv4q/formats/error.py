"""Error of stored weights against their source, tensor by tensor and added up by class. Plain numbers, no tensors.

`compare.py` counts them. Sums are F64, errors relative to a weight are Frobenius norms: |stored - weight| / |weight|.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorError:
    """What storing did to one tensor."""

    exact_fraction: float
    """Share of its elements that decode to the source bit for bit."""
    squared_error: float
    squared_weight: float
    max_abs_error: float

    @property
    def relative(self) -> float:
        """Relative error; infinite where a weight of zeros has one, and where it is not a number."""
        return _relative(self.squared_error, self.squared_weight)

    def as_dict(self) -> dict[str, float | None]:
        """For report.json; SQNR in dB, None where there is no noise."""
        return {
            "exact_fraction": self.exact_fraction,
            "relative_error": self.relative,
            "sqnr_db": sqnr_db(self.relative),
            "max_abs_error": self.max_abs_error,
        }


@dataclass
class Errors:
    """The errors of many tensors of one class."""

    tensors: int = 0
    exact: int = 0
    """Tensors that decode to the source in every element, bit for bit."""
    squared_error: float = 0.0
    squared_weight: float = 0.0
    max_abs_error: float = 0.0
    worst: float = 0.0
    """Largest relative error of one tensor."""
    worst_tensor: str = ""
    each: dict[str, TensorError] = field(default_factory=dict)
    """Per tensor; not part of `as_dict`."""

    def add(self, name: str, error: TensorError) -> None:
        """Count one more tensor."""
        self.each[name] = error
        one = Errors(
            1, int(error.exact_fraction == 1.0), _worst_if_nan(error.squared_error), error.squared_weight,
            _worst_if_nan(error.max_abs_error), error.relative, name,
        )  # fmt: skip
        self.merge(one)

    def add_all(self, names: Sequence[str], sums: Iterable[Sequence[float]]) -> None:
        """Count T tensors; `sums` are the rows of `compare.error_sums`."""
        for name, numbers in zip(names, sums, strict=True):
            self.add(name, TensorError(*numbers))

    def merge(self, other: Errors) -> None:
        """Add what another set of tensors counted."""
        self.tensors += other.tensors
        self.exact += other.exact
        self.squared_error += other.squared_error
        self.squared_weight += other.squared_weight
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)
        if other.worst >= self.worst:
            self.worst, self.worst_tensor = other.worst, other.worst_tensor

    @property
    def relative(self) -> float:
        """Relative error of all tensors together."""
        return _relative(self.squared_error, self.squared_weight)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Errors:
        """Read back what `as_dict` gave."""
        return cls(**{key: raw[key] for key in cls.__dataclass_fields__ if key != "each"})

    def as_dict(self) -> dict[str, Any]:
        """The sums, and what follows from them."""
        sums = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "each"}
        return {**sums, "relative_error": self.relative, "sqnr_db": sqnr_db(self.relative)}


def _relative(squared_error: float, squared_weight: float) -> float:
    if not squared_weight:
        return math.inf if squared_error else 0.0
    return math.sqrt(_worst_if_nan(squared_error / squared_weight))


def _worst_if_nan(value: float) -> float:
    """NaN would lose every comparison, and be skipped."""
    return math.inf if math.isnan(value) else value


def sqnr_db(relative: float) -> float | None:
    """Signal to quantization noise ratio in dB; None for no noise, or nothing but noise."""
    return -20 * math.log10(relative) if 0 < relative < math.inf else None
