"""What a verification says: exact differences, how much was looked at, how large the errors are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One fact that is not as the contract wants it."""

    check: str
    """files, index, headers, config, targets, tensors, mtp, scales, pairs, values, bytes, encoding, error or source."""
    tensor: str | None
    file: str | None
    expected: str
    found: str

    def as_dict(self) -> dict[str, str | None]:
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        place = ", ".join(part for part in (self.tensor, self.file) if part)
        return f"[{self.check}] {place}: expected {self.expected}; found {self.found}"


@dataclass(frozen=True)
class LinearError:
    """Weight error of one linear against the source."""

    signal: float
    """Sum of the squares of the source's values."""
    noise: float
    """Sum of the squares of the errors."""
    max_abs: float
    exact: bool
    """Every value decodes to the source's bit for bit, -0 included."""
    power_of_two: bool
    """Every scale is a power of two (the consumer keeps such FP8 scales as they are)."""

    @property
    def relative(self) -> float:
        """Frobenius norms, |w - dq| / |w|."""
        return math.sqrt(self.noise / self.signal) if self.signal else (math.inf if self.noise else 0.0)

    @property
    def sqnr_db(self) -> float:
        """Signal to noise; infinite without noise."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclass
class ClassErrors:
    """Weight error of one class of linears against the source."""

    tensors: int = 0
    exact: int = 0
    max_abs_error: float = 0.0
    power_of_two_scales: int = 0
    """Tensors all of whose scales are powers of two."""
    max_relative_error: float = 0.0
    worst: str | None = None
    """The tensor that has it."""
    total_relative_error: float = 0.0
    min_sqnr_db: float = math.inf

    def add(self, tensor: str, error: LinearError) -> None:
        """Count one tensor."""
        self.tensors += 1
        self.exact += error.exact
        self.max_abs_error = max(self.max_abs_error, error.max_abs)
        self.power_of_two_scales += error.power_of_two
        if self.worst is None or error.relative > self.max_relative_error:
            self.max_relative_error, self.worst = error.relative, tensor
        self.total_relative_error += error.relative
        self.min_sqnr_db = min(self.min_sqnr_db, error.sqnr_db)

    @property
    def mean_relative_error(self) -> float:
        return self.total_relative_error / self.tensors if self.tensors else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; a signal-to-noise ratio without noise is null."""
        return {
            "tensors": self.tensors,
            "exact": self.exact,
            "max_abs_error": self.max_abs_error,
            "power_of_two_scales": self.power_of_two_scales,
            "max_relative_error": self.max_relative_error,
            "worst": self.worst,
            "mean_relative_error": self.mean_relative_error,
            "min_sqnr_db": self.min_sqnr_db if math.isfinite(self.min_sqnr_db) else None,
        }


@dataclass(frozen=True)
class VerifyResult:
    """The judgement on one artifact."""

    artifact: str
    kind: str
    """`quantized`, or `plain`: a BF16 checkpoint without quantization_config."""
    tensors: int
    shards: int
    bytes: int
    """Tensor data, without headers."""
    mtp_tensors: int
    checks: dict[str, int]
    """Items examined by each check; a check that did not run is absent."""
    differences: tuple[Difference, ...]
    errors: dict[str, dict[str, Any]]
    """Weight error by tensor class (`ClassErrors.as_dict`); empty without a source."""
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.differences

    def exactness(self) -> dict[str, Any] | None:
        """Tensors, exact ones and largest error of all classes together; None without a source."""
        if not self.errors:
            return None
        return {
            "tensors": sum(stats["tensors"] for stats in self.errors.values()),
            "exact": sum(stats["exact"] for stats in self.errors.values()),
            "max_abs_error": max(stats["max_abs_error"] for stats in self.errors.values()),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "artifact": self.artifact,
            "kind": self.kind,
            "ok": self.ok,
            "tensors": self.tensors,
            "shards": self.shards,
            "bytes": self.bytes,
            "mtp_tensors": self.mtp_tensors,
            "checks": dict(self.checks),
            "difference_count": len(self.differences),
            "differences": [difference.as_dict() for difference in self.differences],
            "errors": self.errors,
            "exactness": self.exactness(),
            "seconds": round(self.seconds, 3),
        }


@dataclass
class Log:
    """Collects while a verification runs."""

    differences: list[Difference] = field(default_factory=list)
    checks: Counter[str] = field(default_factory=Counter)

    def looked_at(self, check: str, items: int = 1) -> None:
        self.checks[check] += items

    def differs(
        self, check: str, *, expected: object, found: object, tensor: str | None = None, file: str | None = None
    ) -> None:
        self.differences.append(Difference(check, tensor, file, str(expected), str(found)))


def few(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" … and {rest:,} more" if rest > 0 else "")
