"""What a verification says: exact differences, how much was looked at, how large the errors are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv4q.errors import Dsv4qError
from dsv4q.formats.error import Errors, sqnr_db

QUANTIZED, MODELOPT, PLAIN = "quantized", "modelopt", "plain"
"""What is judged: an artifact in compressed-tensors' or ModelOpt's layout, a BF16 checkpoint without either."""


@dataclass(frozen=True)
class Difference:
    """One fact that is not as the contract wants it."""

    check: str
    """files, index, headers, config, targets, tensors, mtp, scales, pairs, inputs, values, bytes, encoding, exact,
    error, digests or source."""
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


@dataclass
class ClassErrors(Errors):
    """Weight error of one class of linears against the source."""

    power_of_two_scales: int = 0
    """Linears all of whose scales are powers of two: the consumer keeps such FP8 scales as they are."""
    could_be_exact: int = 0
    """Linears that are not exact, but could be under other scales."""

    def merge(self, other: Errors) -> None:
        super().merge(other)
        if isinstance(other, ClassErrors):
            self.each |= other.each
            self.power_of_two_scales += other.power_of_two_scales
            self.could_be_exact += other.could_be_exact

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; a ratio is null without noise and with nothing else, of equal linears the first is worst."""
        errors = [error.relative for error in self.each.values()]
        ratios = [ratio for ratio in map(sqnr_db, errors) if ratio is not None]
        return {
            "tensors": self.tensors,
            "exact": self.exact,
            "could_be_exact": self.could_be_exact,
            "max_abs_error": self.max_abs_error,
            "power_of_two_scales": self.power_of_two_scales,
            "max_relative_error": max(errors, default=0.0),
            "worst": max(self.each, key=lambda name: self.each[name].relative, default=None),
            "mean_relative_error": math.fsum(errors) / len(errors) if errors else 0.0,
            "min_sqnr_db": None if math.inf in errors else min(ratios, default=None),
        }


@dataclass(frozen=True)
class VerifyResult:
    """The judgement on one artifact."""

    artifact: str
    kind: str
    """`QUANTIZED`, `MODELOPT` or `PLAIN`."""
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
    notes: tuple[str, ...]
    """What could not be found out, and why."""
    bytes_read: int
    """Of tensor data, of the artifact and of the source as it lies on disk; 0 if only headers were read."""
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
            "notes": list(self.notes),
            "bytes_read": self.bytes_read,
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


def reason(error: Dsv4qError, *more: str | None) -> str:
    """Why something could not be read, what follows, and what to do."""
    what = error.what if error.found is None else f"{error.what}: {error.found}"
    return "; ".join(part for part in (what, *more, error.hint) if part)


def few(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" … and {rest:,} more" if rest > 0 else "")
