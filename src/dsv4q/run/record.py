"""What is learnt of one block while it is worked on; of several ranks put together, it is the journal's line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dsv4q.formats.error import Errors
from dsv4q.formats.lost import MOST_LOST, zero_shares
from dsv4q.plan.work import RankWork
from dsv4q.run.linears import GLOBAL_SCALES, EncodedLinears, PlannedLinear


@dataclass
class BlockRecord:
    """Of one rank; tensors of the block may still be on their way."""

    done: RankWork
    """What this rank did for the block."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same on every rank: tokens per expert, input scales."""
    errors: defaultdict[str, Errors] = field(default_factory=partial(defaultdict, Errors))
    """Class of tensors -> error of its linears."""
    scales: defaultdict[str, list[float]] = field(default_factory=partial(defaultdict, list))
    """`projection.suffix` -> global scales."""
    lost: dict[str, float] = field(default_factory=dict)
    """Weight -> share of its elements that are zero now and were not, where that is most of them."""

    def note(self, encoded: EncodedLinears, stored: Mapping[str, torch.Tensor], sums: torch.Tensor) -> None:
        """Remember linears whose stored tensors and error sums are on the host now."""
        linears = encoded.linears
        for suffix in (name for name in GLOBAL_SCALES if name in stored):
            for linear, value in zip(linears, stored[suffix].flatten().tolist(), strict=True):
                self.scales[f"{linear.projection}.{suffix}"].append(value)
        self.errors[linears[0].spec.class_name].add_all([linear.spec.name for linear in linears], sums.tolist())
        self._note_lost(linears, stored, sums[:, 0])
        self.done.encoded_linears += len(linears)
        self.done.write_bytes += sum(tensor.nbytes for linear in linears for tensor in linear.planned)

    def _note_lost(
        self, linears: Sequence[PlannedLinear], stored: Mapping[str, torch.Tensor], exact: torch.Tensor
    ) -> None:
        """Remember linears of which most was lost; `exact` F64 [T], the share of each that was not."""
        if bool((exact < 1).any()):
            lost = zero_shares(stored) - exact  # of zeros in the source nothing is lost
            for at in (lost > MOST_LOST).nonzero().flatten().tolist():
                self.lost[linears[at].spec.name] = round(float(lost[at]), 4)

    @classmethod
    def merged(cls, parts: Sequence[BlockRecord]) -> dict[str, Any]:
        """What all ranks learnt of one block, for the journal."""
        errors: defaultdict[str, Errors] = defaultdict(Errors)
        scales: defaultdict[str, list[float]] = defaultdict(list)
        for part in parts:
            for role, found in part.errors.items():
                errors[role].merge(found)
                errors[role].each.update(found.each)
            for name, values in part.scales.items():
                scales[name].extend(values)
        encoded: dict[str, Any] = {
            "errors": {role: found.as_dict() for role, found in errors.items()},
            "tensors": {name: e.as_dict() for found in errors.values() for name, e in found.each.items()},
            "scales": {name: {"min": min(values), "max": max(values)} for name, values in scales.items()},
        }
        lost = {name: share for part in parts for name, share in part.lost.items()}
        encoded |= {"lost": lost} if lost else {}
        return {**parts[0].facts, **(encoded if errors else {}), "ranks": [part.done.as_dict() for part in parts]}
