"""What a run reads: how the source lies on disk, and which release it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv4q.checkpoint.native import (
    NativeCheckpoint,
    entries_of,
    forms_of,
    release_form,
    release_tensors,
    says_native,
)
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.layout import DTYPE_BYTES, Dims, Release, TensorSpec, known_release

NATIVE, BF16, ASSUMED_NATIVE, ASSUMED_BF16 = "native", "bf16", "assumed native", "assumed bf16"
"""Layouts of a source: DeepSeek's FP8 and MXFP4, or BF16; assumed where there is just a config.json."""
_SHOWN = 20
"""Names of missing and of extra tensors that are kept."""


@dataclass(frozen=True)
class SourceFiles:
    """How the source lies on disk."""

    layout: str
    """`NATIVE`, `BF16`, or one of them assumed."""
    forms: dict[str, int]
    """Tensors of the model by the form that they are stored in: MXFP4, FP8, or their dtype."""
    entries: dict[str, tuple[int, int]]
    """Tensor of the model -> tensors in the files that hold it, a scale counted too, and their bytes."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> SourceFiles:
        sizes = {s.name: (1, s.nbytes) for s in specs}
        if checkpoint.has_weights:
            entries = {s.name: entries_of(checkpoint, s.name) for s in specs}
            sizes |= {name: (len(found), sum(e.nbytes for e in found)) for name, found in entries.items() if found}
            return cls(NATIVE if isinstance(checkpoint, NativeCheckpoint) else BF16, forms_of(checkpoint), sizes)
        if not says_native(checkpoint.config):
            return cls(ASSUMED_BF16, dict(Counter(s.dtype for s in specs).most_common()), sizes)
        expert_dtype = _expert_dtype(checkpoint)
        forms = Counter(release_form(s, expert_dtype) or s.dtype for s in specs)
        for spec in specs:
            stored = release_tensors(spec, expert_dtype)
            sizes[spec.name] = len(stored), sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in stored)
        return cls(ASSUMED_NATIVE, dict(forms.most_common()), sizes)

    @property
    def tensors(self) -> int:
        return sum(count for count, _ in self.entries.values())

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.entries.values())


@dataclass(frozen=True)
class Origin:
    """The release whose dimensions the source has, and how far the source's files are that release."""

    release: Release
    missing: tuple[str, ...]
    """Tensors that the release has in its files, or its BF16 model has, and the source has not."""
    extra: tuple[str, ...]
    complete: bool | None
    """Nothing is missing, extra or of another size; None where there are no weights."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, dims: Dims, specs: Sequence[TensorSpec], files: SourceFiles) -> Origin | None:
        """None for a model that is not known."""
        expert_dtype = _expert_dtype(checkpoint)
        release = known_release(dims, expert_dtype)
        if release is None or not checkpoint.has_weights:
            return None if release is None else cls(release, (), (), None)
        if isinstance(checkpoint, NativeCheckpoint):
            there, nbytes = checkpoint.on_disk.tensors, release.nbytes
            wanted = {name for s in specs for name, *_ in release_tensors(s, expert_dtype)}
        else:
            there, nbytes = checkpoint.tensors, sum(s.nbytes for s in specs)
            wanted = {s.name for s in specs}
        missing, extra = sorted(wanted - there.keys()), sorted(there.keys() - wanted)
        return cls(release, tuple(missing), tuple(extra), not missing and not extra and files.nbytes == nbytes)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: of the names the first."""
        return {
            "name": self.release.name,
            "tensors": self.release.tensors,
            "bytes": self.release.nbytes,
            "complete": self.complete,
            "missing": len(self.missing),
            "extra": len(self.extra),
            "missing_names": list(self.missing[:_SHOWN]),
            "extra_names": list(self.extra[:_SHOWN]),
        }


def _expert_dtype(checkpoint: Checkpoint) -> str:
    return "fp8" if checkpoint.config.get("expert_dtype") == "fp8" else "fp4"
