"""Linears of one block on their way into the artifact: one interface, of which `modules.py` and `stacked.py` are the
two makers.

Both find scales and encode; a module does it under llmcompressor's hooks, a stack all experts of a block at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dsv4q.checkpoint.shards import PlannedTensor
from dsv4q.config import Activations
from dsv4q.errors import CalibrationError
from dsv4q.layout import TensorSpec
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP, linears_of
from dsv4q.model.upstream import scheme_of
from dsv4q.recipe.schemes import NVFP4
from dsv4q.run.observers import ExactNvfp4Observer

GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")

BATCH_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Weight elements that are worked on at once: bounds the temporaries to some hundred MB, some GB on a GPU."""

State = dict[str, torch.Tensor]
"""Stored tensors by suffix."""


@dataclass(frozen=True)
class PlannedLinear:
    """One linear to be encoded."""

    spec: TensorSpec
    module: torch.nn.Linear
    """Of routed experts that are worked on as stacks, one that stands for all of its block."""
    planned: tuple[PlannedTensor, ...]
    """What the artifact stores of it."""

    @property
    def projection(self) -> str:
        """`w1`, `wq_a`, ..."""
        return self.spec.module.rpartition(".")[2]

    @property
    def is_nvfp4(self) -> bool:
        """Whether `formats/encode.py` has this scheme."""
        scheme = scheme_of(self.module)
        form = str(getattr(scheme.format, "value", scheme.format))
        inputs = scheme.input_activations
        return (
            form == NVFP4
            and bool(scheme.weights.symmetric)
            and scheme.weights.strategy == "tensor_group"
            and (inputs is None or inputs.dynamic == "local")
        )

    @property
    def is_exact(self) -> bool:
        return isinstance(getattr(self.module, "weight_observer", None), ExactNvfp4Observer)

    def parameter(self, name: str) -> torch.Tensor:
        found = self.module._parameters[name]
        assert found is not None, f"{self.spec.module}.{name}"
        return found.detach()


@dataclass(frozen=True)
class EncodedLinears:
    """Linears that were encoded together."""

    linears: tuple[PlannedLinear, ...]
    stored: State
    """By suffix, each [T, ...] over the linears."""
    sums: torch.Tensor
    """F64 [T, 4], what storing them did; see `formats/compare.py`, `error_sums`."""


@dataclass
class InputScales:
    """How the input scales of one block are found, and what came of it."""

    block: str
    activations: Activations
    bounds: Mapping[str, float]
    """Largest magnitude that each projection's input can have, whatever the data."""
    unseen: set[int] = field(default_factory=set)
    """Experts that saw no token."""
    amax: dict[str, float] = field(default_factory=dict)
    """Largest magnitude that each projection's input scales represent."""

    @property
    def are_bounds(self) -> bool:
        return self.activations.scales == "bound"

    def settled(self, projection: str, scales: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Apply fallback and headroom to observed input scales F32 [T, 1], NaN where no token came.

        Returns:
            The scales, and the places of those that took the fallback: the smallest global scale, i.e. the largest
            amax.

        Raises:
            CalibrationError: no token reached any of them.
        """
        seen = torch.isfinite(scales).all(dim=1)
        if not bool(seen.any()):
            raise CalibrationError(
                "No calibration token reached any expert of a layer",
                where=f"{self.block}, projection {projection}",
                hint="calibrate on more tokens, or with activations: {experts: all}",
            )
        unseen: list[int] = []
        if self.activations.fallback is not None:
            unseen = [int(n) for n in (~seen).nonzero().flatten()]
            scales[~seen] = scales[seen].amin(dim=0)
        if self.activations.headroom != 1.0:
            scales /= self.activations.headroom
        return scales, unseen

    def as_record(self) -> dict[str, object]:
        """For the journal."""
        used = {
            name: {"used": amax, "bound": self.bounds[name]} for name, amax in self.amax.items() if name in self.bounds
        }
        found: dict[str, object] = {} if self.are_bounds else {"experts_without_tokens": sorted(self.unseen)}
        return found | {"input_amax": used}


class Linears(Protocol):
    """Linears of one block that are settled and encoded in one way."""

    def settle(self, inputs: InputScales) -> None:
        """Find all scales, now that every calibration token has been through the block.

        Raises:
            CalibrationError: a non-finite input; no token reached any expert.
        """

    def encoded(self, mine: Collection[str]) -> Iterator[EncodedLinears]:
        """Encode those whose weights are named in `mine`, some at a time."""


def planned_linears(model: DeepseekV4ForCausalLMWithMTP, tensors: Iterable[PlannedTensor]) -> tuple[PlannedLinear, ...]:
    """The linears to be encoded among the planned tensors of a block."""
    planned: dict[str, list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.encoded:
            planned[tensor.spec.name].append(tensor)
    parts = [tuple(found) for found in planned.values()]
    specs = [found[0].spec for found in parts]
    return tuple(map(PlannedLinear, specs, linears_of(model, specs), parts))


def unusable_scales(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which of T linears have a scale that no consumer can use, among their stored tensors [T, ...]; Bool [T].

    On the tensors' device, and waits for none: of a layer's experts there are 0.4 GB of scales, which a CPU looks
    through more slowly than a GPU encodes.
    """
    return torch.stack([bad.flatten(1).any(dim=1) for bad in _unusable(stored).values()]).any(dim=0)


def _unusable(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where the scales among stored tensors are zero, negative, NaN or infinite."""
    found = {}
    for name, value in stored.items():
        if name.endswith("scale"):
            # Of E4M3 0x00 is zero, 0x80 and above are negative, 0x7f is NaN; there is no infinity.
            is_e4m3 = value.dtype is torch.float8_e4m3fn
            usable = torch.isfinite(value) & (value > 0) if not is_e4m3 else (value.view(torch.uint8) - 1) <= 0x7D
            found[name] = ~usable
    return found


def check_scales(linears: Sequence[PlannedLinear], stored: Mapping[str, torch.Tensor]) -> None:
    """Refuse what `unusable_scales` finds.

    Raises:
        CalibrationError: a scale that is zero, negative, NaN or infinite; names the first such module.
    """
    for name, bad in _unusable(stored).items():
        if not bool(bad.any()):
            continue
        value = stored[name]
        at = int(bad.flatten(1).any(dim=1).nonzero()[0])
        raise CalibrationError(
            "A scale is not positive and finite",
            where=f"{linears[at].spec.module}.{name}",
            expected="every element finite and above zero",
            found=f"{int(bad[at].sum())} of {bad[at].numel()} are not, e.g. {float(value[at][bad[at]][0])}",
            hint="an input scale without tokens: use activations.experts: all, or routed with a fallback",
        )


def check_inputs(linears: Sequence[PlannedLinear], ends: torch.Tensor, seen: torch.Tensor | None = None) -> None:
    """Refuse non-finite input statistics: compressed-tensors would turn them into a global scale of 1.0.

    Args:
        ends: [T, 2], smallest and largest input of T linears.
        seen: BOOL [T], those that had an input; all of them if left out.

    Raises:
        CalibrationError: names the first such linear.
    """
    bad = (~torch.isfinite(ends)).any(dim=1)
    if seen is not None:
        bad &= seen
    if not bool(bad.any()):
        return
    at = int(bad.nonzero()[0])
    raise CalibrationError(
        "The activations became non-finite while calibrating",
        where=f"input of {linears[at].spec.module}",
        expected="a finite smallest and largest value",
        found=ends[at].tolist(),
        hint="the source's weights of this layer are damaged or not of this architecture",
    )
