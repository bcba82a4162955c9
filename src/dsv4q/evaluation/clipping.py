"""Which share of a text's activations lies beyond the range that calibration gave the linears that they go into.

NVFP4 inputs have one calibrated number, the global scale G (a divisor): the largest E4M3 scale times the largest E2M1
value is 448 * 6 / G, and what is larger becomes that. Of the experts of a layer it is the widest range of them all,
because the consumer uses no other (`emulate.py`). Only inputs that are rounded are counted, where they are rounded, so
a routed expert counts the tokens that the router sends it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4q.evaluation.emulate import Quantizer
from dsv4q.layout import Role, TensorSpec

_SLACK = 1 + 2**-20
"""448 * 6 / (448 * 6 / amax) in F32 may be below amax; the next BF16 number is 2^-8 away."""


@dataclass
class Tally:
    """Inputs of the linears of one class in one block."""

    values: int = 0
    vectors: int = 0
    beyond: Tensor | int = 0
    """Values beyond the range; on the device, so that nothing waits for it."""
    clipped: Tensor | int = 0
    """Vectors with such a value."""
    largest: Tensor | float = 0.0
    """Largest magnitude, in units of the range."""

    def add(self, x: Tensor, limit: Tensor) -> None:
        """Inputs [..., N] of a linear, and the largest magnitude F32 [1] that its calibrated scale represents."""
        magnitude = x.abs().reshape(-1, x.shape[-1])
        beyond = magnitude > limit * _SLACK
        self.values += magnitude.numel()
        self.vectors += len(magnitude)
        self.beyond = self.beyond + beyond.sum()
        self.clipped = self.clipped + beyond.any(dim=-1).sum()
        self.largest = torch.clamp(magnitude.amax() / limit, min=self.largest)

    def as_dict(self) -> dict[str, float]:
        return {
            "clipped_values": float(self.beyond) / self.values,
            "clipped_inputs": float(self.clipped) / self.vectors,
            "largest": float(self.largest),
        }


@dataclass
class Clipping:
    """Tallies by class of linears and block."""

    counting: bool = True
    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))

    def watched(self, spec: TensorSpec, limit: Tensor, rounding: Quantizer) -> Quantizer:
        """`rounding` of the inputs of a linear, which are counted on the way; `limit` as in `Tally.add`."""
        key = class_of(spec), spec.block

        def counted(x: Tensor) -> Tensor:
            if self.counting and x.numel():
                self.tallies[key].add(x, limit)
            return rounding(x)

        return counted

    def as_dict(self) -> dict[str, Any]:
        """Shares by class, and by class and block.

        `clipped_values`: share of values beyond the range. `clipped_inputs`: share of inputs, one for each token and
        linear, with such a value. `largest`: the largest magnitude seen, in units of the range.
        """
        classes: dict[str, Tally] = defaultdict(Tally)
        for (name, _), one in self.tallies.items():
            whole = classes[name]
            whole.values += one.values
            whole.vectors += one.vectors
            whole.beyond = whole.beyond + one.beyond
            whole.clipped = whole.clipped + one.clipped
            whole.largest = max(float(whole.largest), float(one.largest))
        return {
            "classes": {name: whole.as_dict() for name, whole in classes.items()},
            "blocks": [{"class": name, "block": block, **one.as_dict()} for (name, block), one in self.tallies.items()],
        }


def class_of(spec: TensorSpec) -> str:
    """`routed experts w1, w3`, `routed experts w2`, `draft's routed experts w2`, `attention projection wkv`, ..."""
    projection = spec.module.rpartition(".")[2]
    if spec.role == Role.ROUTED_EXPERT:
        name = f"routed experts {'w2' if projection == 'w2' else 'w1, w3'}"
    else:
        name = f"{spec.role} {projection}"
    return f"draft's {name}" if spec.block.startswith("mtp.") else name
