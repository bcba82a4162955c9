"""A checkpoint against the layout: exact names, dtypes and shapes, and one error for each difference of one cause."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsv4q.checkpoint.headers import TensorEntry, few, shown
from dsv4q.checkpoint.layout import Dims, Role, TensorSpec, source_tensors
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import SourceError

_MTP = re.compile(r"mtp\.(\d+)\.([^.]+)")
_BLOCK = re.compile(r"(layers|mtp)\.\d+(?=\.)")
_OURS = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "U8", "I8")


def draft_kind(names: Iterable[str]) -> str:
    """What lies under `mtp.`: 'none', 'mtp' (every layer has enorm and hnorm), 'dspark' (a Markov head and neither
    norm; published under the same prefix) or 'unknown'."""
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if name.startswith("mtp."):
            match = _MTP.match(name)
            parts[match[1] if match else ""].add(match[2] if match else name)
    norms = {"enorm", "hnorm"}
    if not parts:
        return "none"
    if all(norms <= found for found in parts.values()):
        return "mtp"
    every = set().union(*parts.values())
    return "dspark" if not norms & every and any("markov" in part for part in every) else "unknown"


def compare_with_layout(checkpoint: Checkpoint, dims: Dims) -> list[SourceError]:
    """Exact comparison of names, dtypes and shapes with `layout.source_tensors(dims)`.

    One error for each kind of difference and block, with the exact count and the first names; a difference that has
    one known cause (another vocabulary, a quantized release, a draft that config.json does not describe) is one error.
    Tensors that `checkpoint.problems` already accounts for are not called missing. No weights: nothing to compare.
    """
    if not checkpoint.has_weights:
        return []
    diff = _Difference.of(checkpoint, dims)
    errors = [*_transformers_names(diff), *_already_quantized(diff), *_draft(diff, dims)]
    errors += [*_missing_blocks(diff), *_missing_experts(diff, dims)]
    foreign = "see whether config.json belongs to these files"
    for names, kind, hint in (
        (diff.missing, "missing", "download the checkpoint again, or correct the sizes in config.json"),
        (diff.extra, "too many", f"{foreign}, and remove what is not the model's"),
        (diff.dtype, "of another dtype", "convert the checkpoint again, keeping F32 tensors F32"),
        (diff.shape, "of another shape", foreign),
    ):
        errors += _by_block(diff, names, kind, hint)
    return errors


@dataclass
class _Difference:
    """How a checkpoint differs from the layout, by name. Special cases take out what they explain."""

    checkpoint: Checkpoint
    specs: dict[str, TensorSpec]
    missing: set[str]
    extra: set[str]
    dtype: set[str]
    shape: set[str]
