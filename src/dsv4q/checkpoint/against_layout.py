"""A checkpoint against the layout: exact names, dtypes and shapes, and one error for each difference of one cause.

Of the data only the tables of hash-routed layers are looked at, for they are indices.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsv4q.checkpoint.headers import TensorEntry, few, shown
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import SourceError
from dsv4q.layout import (
    DRAFTS,
    DSPARK,
    EXPERT_PROJECTIONS,
    MTP,
    NO_DRAFT,
    Dims,
    DraftTable,
    Role,
    TensorSpec,
    source_tensors,
)

_MTP = re.compile(r"mtp\.(\d+)\.([^.]+)")
_BLOCK = re.compile(r"(layers|mtp)\.\d+(?=\.)")
_STACKED = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_OURS = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
_SAME_RELEASE = "take config.json and files of one release; see whether a download replaced one of them"
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "U8", "I8")


def draft_kind(names: Iterable[str]) -> str:
    """What lies under `mtp.`: NO_DRAFT, MTP (every layer has enorm and hnorm), DSPARK, or 'unknown' (of no known kind,
    or of several)."""
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if name.startswith("mtp."):
            match = _MTP.match(name)
            parts[match[1] if match else ""].add(match[2] if match else name)
    if not parts:
        return NO_DRAFT
    kinds = {kind for kind, table in DRAFTS.items() if any(table.marks & found for found in parts.values())}
    if kinds == {MTP}:
        return MTP if all({"enorm", "hnorm"} <= found for found in parts.values()) else "unknown"
    return DSPARK if kinds == {DSPARK} else "unknown"


def compare_with_layout(checkpoint: Checkpoint, dims: Dims) -> list[SourceError]:
    """Exact comparison of names, dtypes and shapes with `layout.source_tensors(dims)`; native ones as `as_source` does.

    One error for each kind of difference and block, with the exact count and the first names; a difference that has
    one known cause (another vocabulary, a quantized artifact, a draft that config.json does not describe) is one error.
    Tensors that `checkpoint.problems` already accounts for are not called missing. No weights: nothing to compare.
    """
    if not checkpoint.has_weights:
        return []
    diff = _Difference.of(checkpoint, dims)
    errors = [*_prefixed_names(diff), *_transformers_names(diff), *_artifact(diff), *_draft(diff, dims)]
    errors += [*_missing_blocks(diff), *_missing_experts(diff, dims)]
    foreign = "see whether config.json belongs to these files"
    for names, kind, hint in (
        (diff.missing, "missing", "download the checkpoint again, or correct the sizes in config.json"),
        (diff.extra, "too many", f"{foreign}, and remove what is not the model's"),
        (diff.wider(), "of another dtype", "store these as BF16: dsv4q reads BF16, or DeepSeek's own FP8 and MXFP4"),
        (diff.dtype, "of another dtype", "convert the checkpoint again, keeping F32 tensors F32"),
        (diff.shape, "of another shape", foreign),
    ):
        errors += _by_block(diff, names, kind, hint)
    return errors


def check_routing(checkpoint: Checkpoint, dims: Dims) -> list[SourceError]:
    """The tables of hash-routed layers against the number of experts; reads those tables, 6 MB each at full size.

    Raises:
        SourceError: the disk fails.
    """
    errors = []
    for spec in source_tensors(dims):
        entry = checkpoint.tensors.get(spec.name)
        if spec.dtype != "I64" or entry is None or (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            continue
        if not checkpoint.is_whole(spec.name):
            continue
        table = memoryview(bytearray(entry.nbytes))
        checkpoint.read_into(spec.name, table)
        table = table.cast("q")
        wrong = sum(not 0 <= expert < dims.experts for expert in table)
        if wrong:
            what = "A routing table names experts that there are not"
            found = f"{wrong:,} of {len(table):,} entries, from {min(table):,} to {max(table):,}"
        elif not any(table) and dims.experts > 1:
            what, found = "A routing table is nothing but zeros", f"{len(table):,} zeros"
        else:
            continue
        errors.append(
            SourceError(
                what,
                where=f"{checkpoint.root / entry.file}: {spec.name}",
                expected=f"experts 0 to {dims.experts - 1:,}, as n_routed_experts in config.json has it",
                found=found,
                hint="download this file again, or see whether config.json belongs to it",
            )
        )
    return errors


@dataclass
class _Difference:
    """How a checkpoint differs from the layout, as names. Special cases take out what they explain."""

    checkpoint: Checkpoint
    specs: dict[str, TensorSpec]
    missing: list[str]
    extra: list[str]
    dtype: list[str]
    shape: list[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, dims: Dims) -> _Difference:
        specs = {spec.name: spec for spec in source_tensors(dims)}
        there = checkpoint.tensors
        both = [name for name in specs if name in there]
        return cls(
            checkpoint,
            specs,
            missing=[n for n in specs if n not in there and n not in checkpoint.unread],
            extra=[n for n in there if n not in specs],
            dtype=[n for n in both if there[n].dtype != specs[n].dtype],
            shape=[n for n in both if there[n].shape != specs[n].shape],
        )

    def explain(self, names: Iterable[str]) -> None:
        """Leave these names out of the errors still to come."""
        known = set(names)
        for part in (self.missing, self.extra, self.dtype, self.shape):
            part[:] = [name for name in part if name not in known]

    def wider(self) -> list[str]:
        """Tensors that should be BF16 and are F16, F32 or F64; taken out."""
        found = [
            name
            for name in self.dtype
            if self.specs[name].dtype == "BF16" and self.checkpoint.tensors[name].dtype in ("F16", "F32", "F64")
        ]
        self.explain(name for name in found if name not in self.shape)
        return found

    def blocks(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Names by block, main blocks in the layout's order, what belongs to none at the end."""
        groups: dict[str, list[str]] = {spec.block: [] for spec in self.specs.values()}
        for name in names:
            match = _BLOCK.match(name)
            block = self.specs[name].block if name in self.specs else match[0] if match else "no block"
            groups.setdefault(block, []).append(name)
        return {block: group for block, group in groups.items() if group}

    def error(self, what: str, expected: str, found: str, hint: str) -> SourceError:
        return SourceError(what, where=self.checkpoint.root, expected=expected, found=found, hint=hint)


def _transformers_names(diff: _Difference) -> list[SourceError]:
    by_hf = {spec.hf_name: spec.name for spec in diff.specs.values()}
    names = [name for name in diff.extra if name in by_hf]
    # Its experts are stacked, under names that are nobody's else.
    names += [name for name in diff.extra if _STACKED.search(name)]
    if not names:
        return []
    # Once some names are, the others are neither missing nor too many.
    diff.explain([*diff.extra, *diff.missing])
    return [
        diff.error(
            f"{len(names):,} tensors have transformers' names instead of DeepSeek's",
            f"upstream names such as {by_hf[names[0]]}",
            few(names),
            "use the original checkpoint; one saved by transformers has lost its mtp.* tensors",
        )
    ]


def _prefixed_names(diff: _Difference) -> list[SourceError]:
    """DeepSeek's names behind a prefix, as wrappers write them."""
    prefixes: dict[str, list[str]] = defaultdict(list)
    missing = set(diff.missing)
    for name in diff.extra:
        parts = name.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in missing:
                prefixes[".".join(parts[:count]) + "."].append(name)
                break
    errors = []
    # model.norm.weight is a name of transformers' as well, but one of few.
    for prefix, names in ((p, found) for p, found in prefixes.items() if 2 * len(found) > len(diff.extra)):
        diff.explain([*names, *(name.removeprefix(prefix) for name in names)])
        errors.append(
            diff.error(
                f"{_count(names, 'tensor')} {'has' if len(names) == 1 else 'have'} names with {prefix} before them",
                f"upstream names such as {names[0].removeprefix(prefix)}",
                few([shown(name) for name in names]),
                f"rename them, in shards and index, without {prefix}",
            )
        )
    return errors


def _artifact(diff: _Difference) -> list[SourceError]:
    tensors, specs = diff.checkpoint.tensors, diff.specs
    ours = [name for name in diff.extra if name.endswith(_OURS)]
    if not ours:
        return []
    low = [n for n in diff.dtype if tensors[n].dtype in _EIGHT_BITS and specs[n].dtype == "BF16"]
    diff.explain([*ours, *low, *(f"{name.removesuffix('.weight_packed')}.weight" for name in ours)])
    found = [f"{len(ours):,} compressed-tensors tensors"]
    found += [f"weights in {dtype}: {count:,}" for dtype, count in Counter(tensors[n].dtype for n in low).items()]
    return [
        diff.error(
            "This source is a quantized artifact in compressed-tensors format, not a BF16 checkpoint",
            "BF16 weights, or DeepSeek's own FP8 and MXFP4",
            f"{', '.join(found)} ({few(ours)})",
            "give the checkpoint that it was made from",
        )
    ]


def _draft(diff: _Difference, dims: Dims) -> list[SourceError]:
    """The draft of the files against that of config.json, where they are of different kinds."""
    error = _other_draft(diff, dims)
    if error is None:
        return []
    diff.explain(name for name in (*diff.specs, *diff.checkpoint.tensors) if name.startswith("mtp."))
    return [error]


def _other_draft(diff: _Difference, dims: Dims) -> SourceError | None:
    key, told = "num_nextn_predict_layers", dims.draft.kind
    count = f"{key}: {diff.checkpoint.config.get(key, 'no such key')}"
    names = [name for name in diff.checkpoint.tensors if name.startswith("mtp.")]
    every = [*names, *(name for name in diff.checkpoint.unread if name.startswith("mtp."))]
    marks = {kind: _marking(every, table) for kind, table in DRAFTS.items()}
    if all(marks.values()):
        found = "; ".join(f"of {DRAFTS[kind].label}: {few(some)}" for kind, some in marks.items())
        hint = "download one release as a whole into an empty folder"
        return diff.error("The draft under mtp. mixes MTP and DSpark", "one kind of draft", found, hint)
    if marks[DSPARK] and told != DSPARK:
        expected = "mtp.N.enorm.weight and mtp.N.hnorm.weight, or a config.json with the dspark_* keys"
        found = f"{few(marks[DSPARK])}, and {count} without dspark_* keys"
        return diff.error("The draft under mtp. is a DSpark draft, not MTP", expected, found, _SAME_RELEASE)
    if marks[MTP] and told == DSPARK:
        expected = "mtp.0.main_proj.weight, or a config.json without the dspark_* keys"
        found = f"{few(marks[MTP])}, and dspark_* keys"
        return diff.error("The draft under mtp. is MTP, not a DSpark draft", expected, found, _SAME_RELEASE)
    if names and told == NO_DRAFT:
        what, expected = "The files have MTP tensors, but config.json has no MTP layer", f"{key} of at least 1"
        found = f"{count}; {len(names):,} mtp.* tensors: {few(names)}"
        hint = f"restore {key} in config.json (DeepSeek-V4-Flash: 1), or remove the mtp.* tensors"
        return diff.error(what, expected, found, hint)
    if not every and any(diff.specs[name].is_mtp for name in diff.missing):
        label, whose = DRAFTS[told].label, count if told == MTP else "dspark_* keys"
        without = f"set {key} to 0" if told == MTP else "take the dspark_* keys out of it"
        return diff.error(
            f"config.json has {label}, but the files have no mtp.* tensor",
            f"{sum(spec.is_mtp for spec in diff.specs.values()):,} mtp.* tensors ({whose})",
            "none",
            f"download a checkpoint with {label}, or {without} to make an artifact without it",
        )
    return None


def _marking(names: Iterable[str], table: DraftTable) -> list[str]:
    """Those that only this kind of draft has."""
    return [name for name in names if (match := _MTP.match(name)) and match[2] in table.marks]


def _missing_blocks(diff: _Difference) -> list[SourceError]:
    whole = diff.blocks(diff.specs)
    gone = {b: names for b, names in diff.blocks(diff.missing).items() if len(names) == len(whole[b]) > 1}
    diff.explain(name for names in gone.values() for name in names)
    hint = "download the checkpoint again, or correct the number of layers in config.json"
    return [
        diff.error(f"{block} is missing as a whole", f"{len(names):,} tensors: {few(names)}", "none of them", hint)
        for block, names in gone.items()
    ]


def _missing_experts(diff: _Difference, dims: Dims) -> list[SourceError]:
    """Experts of which all three projections are missing."""
    errors = []
    for block, names in diff.blocks(n for n in diff.missing if diff.specs[n].role == Role.ROUTED_EXPERT).items():
        counts = Counter(diff.specs[name].expert for name in names)
        gone = sorted(e for e, count in counts.items() if e is not None and count == len(EXPERT_PROJECTIONS))
        if not gone:
            continue
        lost = [name for name in names if diff.specs[name].expert in gone]
        diff.explain(lost)
        errors.append(
            diff.error(
                f"{_count(gone, 'routed expert')} of {block} {_are(gone)} missing: {_ranges(gone)}",
                f"{dims.experts:,} experts (n_routed_experts), numbered from 0",
                f"{dims.experts - len(gone):,}; {len(lost):,} tensors are missing: {few(lost)}",
                "download the checkpoint again, or correct n_routed_experts in config.json",
            )
        )
    return errors


def _by_block(diff: _Difference, names: Iterable[str], kind: str, hint: str) -> list[SourceError]:
    """One error for the tensors of each block that are `kind`."""
    errors = []
    for block, group in diff.blocks(names).items():
        entry = diff.checkpoint.tensors.get(group[0])
        errors.append(
            SourceError(
                f"{_count(group, 'tensor')} of {block} {_are(group)} {kind}: {few([shown(n) for n in group])}",
                where=diff.checkpoint.root / ("" if entry is None else entry.file),
                expected=_described(diff.specs.get(group[0])),
                found=_described(entry),
                hint=hint,
            )
        )
    return errors


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items):,} {noun}{'s' * (len(items) != 1)}"


def _are(items: Sequence[object]) -> str:
    return "is" if len(items) == 1 else "are"


def _described(tensor: TensorSpec | TensorEntry | None) -> str:
    return "no such tensor" if tensor is None else f"{shown(tensor.name)} {tensor.dtype} {list(tensor.shape)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: [3, 7, 8, 9] -> '3, 7-9'."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return few([f"{a}" if a == b else f"{a}-{b}" for a, b in runs], most=12)
