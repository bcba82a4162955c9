"""What `dsv4q diff` found: one value for each pair of tensors, tables of them by class, as JSON and as text."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4q.console import Console, human_bytes, human_seconds
from dsv4q.foreign.layouts import Logical, is_input_scale
from dsv4q.formats.compare import Comparison
from dsv4q.formats.error import Errors

EQUAL_BYTES, EQUAL_VALUES, DIFFERENT = "equal_bytes", "equal_values", "different"
OTHER_SHAPE, NOT_DECODED = "other_shape", "not_decoded"
VERDICTS = (EQUAL_BYTES, EQUAL_VALUES, DIFFERENT, OTHER_SHAPE, NOT_DECODED)

SHOWN = 10
"""Tensors of each list that are printed; `--json` has all of them."""


@dataclass
class TensorPair:
    """One tensor of the model that both have, and what was found of it."""

    name: str
    kind: str
    """Its class."""
    a: Logical
    b: Logical
    bytes_equal: bool = True
    """Of what was read so far; means something only with `same_storage`."""
    comparison: Comparison = field(default_factory=Comparison)
    """Of the pieces whose bytes differ."""

    @property
    def same_storage(self) -> bool:
        """Stored under the same suffixes, as the same dtypes and shapes."""
        facts = [{s: (e.dtype, e.shape) for s, e in side.parts.items()} for side in (self.a, self.b)]
        return facts[0] == facts[1]

    @property
    def same_shape(self) -> bool:
        """A scalar and a vector of one are the same."""
        shapes = [(1,) if math.prod(side.shape) == 1 else side.shape for side in (self.a, self.b)]
        return shapes[0] == shapes[1]

    @property
    def is_decoded(self) -> bool:
        """Whether the values of both can be told."""
        return not (self.a.unknown or self.b.unknown)

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""
        if self.same_storage and self.bytes_equal:
            return EQUAL_BYTES
        if not self.is_decoded:
            return NOT_DECODED
        if not self.same_shape:
            return OTHER_SHAPE
        return DIFFERENT if self.comparison.unequal else EQUAL_VALUES

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: how both are stored, and the error of B against A where values were compared."""
        facts: dict[str, Any] = {"tensor": self.name, "class": self.kind, "verdict": self.verdict}
        for side, logical in (("a", self.a), ("b", self.b)):
            facts[side] = {"stored_as": logical.form, "shape": list(logical.shape)}
            if logical.unknown:
                facts[side]["reason"] = logical.unknown
        return facts | (self._as_numbers() if self.comparison.values else {})

    def _as_numbers(self) -> dict[str, float]:
        error = self.comparison.error
        return {
            "values": self.comparison.values,
            "unequal": self.comparison.unequal,
            "signs_of_zero": self.comparison.zero_signs,
            "not_finite": self.comparison.not_finite,
            "relative_error": error.relative,
            "max_abs_error": error.max_abs_error,
        }


def by_class(pairs: Iterable[TensorPair], only: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Counts and errors of each class; `only` has the class of each tensor that only `a` or only `b` has."""
    members: dict[str, list[TensorPair]] = defaultdict(list)
    for pair in pairs:
        members[pair.kind].append(pair)
    lone = {side: Counter(kinds) for side, kinds in only.items()}
    found = {}
    for kind in dict.fromkeys([*members, *lone["a"], *lone["b"]]):
        counts = Counter(pair.verdict for pair in members[kind])
        errors, compared = Errors(), [pair for pair in members[kind] if pair.comparison.values]
        for pair in compared:
            errors.add(pair.name, pair.comparison.error)
        worst = max(compared, key=lambda pair: pair.comparison.error.relative, default=None)
        found[kind] = {
            "both": len(members[kind]),
            "only_a": lone["a"][kind],
            "only_b": lone["b"][kind],
            **{verdict: counts[verdict] for verdict in VERDICTS},
            "relative_error": errors.relative if compared else None,
            "max_abs_error": errors.max_abs_error if compared else None,
            "worst": None if worst is None else errors.worst,
            "worst_tensor": None if worst is None or not worst.comparison.unequal else worst.name,
        }
    return found


def transitions(pairs: Iterable[TensorPair]) -> list[dict[str, Any]]:
    """How many tensors of each class are stored as one thing in A and as another in B."""
    counts = Counter((pair.kind, pair.a.form, pair.b.form) for pair in pairs if pair.a.form != pair.b.form)
    return [{"class": kind, "a": a, "b": b, "tensors": count} for (kind, a, b), count in counts.items()]


# ------------------------------------------------------------------------------------------------ text


def show_diff(result: Mapping[str, Any], console: Console) -> None:
    """Tables by class, what is stored otherwise, the first tensors of each kind of difference."""
    for side in ("a", "b"):
        facts = result[side]
        console.print(
            f"{side.upper()}  {facts['path']}: {facts['tensors']:,} tensors in its files, "
            f"{facts['logical']:,} of the model, {human_bytes(facts['bytes'])}"
        )
    columns = _columns(result["classes"])
    console.table(
        "Tensors of the model by class",
        ["class", *(label for label, _ in columns), "relative error", "worst", "of"],
        [
            [kind, *(found[key] for _, key in columns), *_errors(found)]
            for kind, found in sorted(result["classes"].items(), key=lambda item: -item[1]["both"])
        ],
    )
    if result["stored_as"]:
        console.table(
            "Stored as another type",
            ["class", "A", "B", "tensors"],
            [[one["class"], one["a"], one["b"], one["tensors"]] for one in result["stored_as"]],
        )
    for title, names in _lists(result):
        console.print(f"{title}: {len(names):,}")
        for name in names[:SHOWN]:
            console.print(f"  {name}")
        if len(names) > SHOWN:
            console.print(f"  … and {len(names) - SHOWN:,} more; --json lists all")
    console.print("every tensor is the same, byte for byte" if result["same"] else "DIFFERENT")
    console.talk(f"compared in {human_seconds(result['seconds'])} on {result['device']}")


def _columns(classes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Columns of counts; those for rare things only if there is one."""
    always = (
        ("in both", "both"), ("only A", "only_a"), ("only B", "only_b"), ("equal bytes", EQUAL_BYTES),
        ("equal values", EQUAL_VALUES), ("different", DIFFERENT),
    )  # fmt: skip
    rare = (("another shape", OTHER_SHAPE), ("not decoded", NOT_DECODED))
    return [*always, *(column for column in rare if any(found[column[1]] for found in classes.values()))]


def _errors(found: Mapping[str, Any]) -> list[str]:
    if found["relative_error"] is None:
        return ["-", "-", "-"]
    return [_percent(found["relative_error"]), _percent(found["worst"]), found["worst_tensor"] or "-"]


def _percent(share: float) -> str:
    """Small errors keep three digits: 6.1 %, 0.00002 %."""
    return f"{100 * share:.3g} %"


def _lists(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    tensors = result["tensors"]
    different = sorted((t for t in tensors if t["verdict"] == DIFFERENT), key=lambda t: -t["relative_error"])
    shaped = [t for t in tensors if t["verdict"] == OTHER_SHAPE]
    unknown = [t for t in tensors if t["verdict"] == NOT_DECODED]
    lists = [
        # There may be thousands of input scales, so they come last.
        ("only in A", sorted(result["only_a"], key=is_input_scale)),
        ("only in B", sorted(result["only_b"], key=is_input_scale)),
        ("of another shape", [f"{t['tensor']}: {t['a']['shape']} and {t['b']['shape']}" for t in shaped]),
        ("bytes differ, values cannot be told", [f"{t['tensor']}: {_reason(t)}" for t in unknown]),
        ("of other values, the worst first", [_told(t) for t in different]),
    ]
    return [(title, names) for title, names in lists if names]


def _told(tensor: Mapping[str, Any]) -> str:
    odd = f", {tensor['not_finite']:,} of them NaN or infinite" if tensor["not_finite"] else ""
    return (
        f"{tensor['tensor']}: relative error {_percent(tensor['relative_error'])}, "
        f"{tensor['unequal']:,} of {tensor['values']:,} values differ{odd}"
    )


def _reason(tensor: Mapping[str, Any]) -> str:
    return "; ".join(f"{s.upper()}: {tensor[s]['reason']}" for s in ("a", "b") if "reason" in tensor[s])
