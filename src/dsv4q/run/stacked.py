"""Scales and encoded form of a block's routed experts, stack by stack instead of module by module.

For the schemes and observers that the stacks know; every other goes through its modules (`modules.py`), and both give
the same bits.

Shape letters: E experts, T tensors worked on together, P projections that share a global scale (w1, w3), M rows,
N columns, G = N / 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.observers.min_max import MemorylessMinMaxObserver, StaticMinMaxObserver
from torch import Tensor

from dsv4q.config import Activations
from dsv4q.formats.encode import E2M1_MAX, E4M3_MAX, NVFP4_GROUP
from dsv4q.formats.exact import nvfp4_scales
from dsv4q.formats.kernels import nvfp4_encode_measured
from dsv4q.layout import Role
from dsv4q.model.upstream import scheme_of
from dsv4q.run.experts import PROJECTIONS, BatchedExperts, ExpertMemory
from dsv4q.run.modules import BATCH_ELEMENTS, Member, State, not_finite_input, settled_scales
from dsv4q.run.observers import ExactNvfp4Observer

WEIGHT_OBSERVERS = (ExactNvfp4Observer, MemorylessMinMaxObserver)


@dataclass(frozen=True)
class StackPart:
    """Encoded experts: their members, their stored tensors by suffix [T, ...], and what storing them did."""

    members: tuple[Member, ...]
    stored: State
    sums: Tensor
    """F64 [T, 4], see `compare.error_sums`."""


@dataclass(frozen=True)
class StackLayout:
    """Which linears of a block make its stacks."""

    members: dict[str, list[Member]]
    """`gate_up`: w1 and w3 of expert 0, of expert 1, and so on; `down`: w2."""

    @classmethod
    def of(cls, members: Sequence[Member]) -> StackLayout | None:
        """The routed experts among the members of a block, or None if modules have to do."""
        routed = [m for m in members if m.spec.role == Role.ROUTED_EXPERT]
        places = {(*PROJECTIONS[m.projection], m.spec.expert): m for m in routed}
        experts = len(routed) // 3
        wanted = {
            "gate_up": [("gate_up", place, e) for e in range(experts) for place in (0, 1)],
            "down": [("down", 0, e) for e in range(experts)],
        }
        if not routed or {place for part in wanted.values() for place in part} != set(places):
            return None
        found = cls({name: [places[place] for place in part] for name, part in wanted.items()})
        uniform = all(_kind(m) == _kind(part[0]) for part in found.members.values() for m in part)
        return found if uniform and all(_is_known(m) for m in routed) else None


@dataclass
class ExpertStack:
    """All routed experts of one block."""

    layout: StackLayout
    memory: ExpertMemory
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    """Projection -> F32 [E, 1], where the scheme stores them."""

    @property
    def members(self) -> dict[str, list[Member]]:
        return self.layout.members

    @property
    def stores_input_scales(self) -> bool:
        return all("input_global_scale" in part[0].module._parameters for part in self.members.values())

    def observed_input_scales(self, seen: BatchedExperts, block: str, activations: Activations) -> list[int]:
        """Take the input scales from what a forward observed; returns the experts that saw no token.

        Raises:
            CalibrationError: a non-finite input; no token reached any expert.
        """
        unseen: set[int] = set()
        reached = seen.seen
        for projection, ends in (("w1", seen.input_ends), ("w3", seen.input_ends), ("w2", seen.hidden_ends)):
            self._check_observed(projection, ends, reached)
            scales = _observed_scale(ends, reached)
            self.input_scales[projection], without = settled_scales(
                scales, f"{block}, projection {projection}", activations
            )
            unseen.update(without)
        return sorted(unseen)

    def _check_observed(self, projection: str, ends: Tensor, seen: Tensor) -> None:
        """Refuse non-finite input statistics: compressed-tensors would turn them into a global scale of 1.0."""
        bad = seen & ~torch.isfinite(ends).all(dim=1)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            stack, _ = PROJECTIONS[projection]
            member = next(m for m in self.members[stack] if (m.projection, m.spec.expert) == (projection, at))
            raise not_finite_input(member, ends[at].tolist())

    def bound_input_scales(self, bounds: Mapping[str, float]) -> None:
        """Set the input scales from the largest magnitude that each projection's input can have."""
        device = self.memory.gate_up.device
        for projection in PROJECTIONS:
            scale = torch.full((len(self.memory.gate_up), 1), E4M3_MAX * E2M1_MAX / bounds[projection], device=device)
            self.input_scales[projection] = scale

    def input_amax(self) -> dict[str, float]:
        """Largest magnitude that each projection's input scale represents, over all experts."""
        return {name: E4M3_MAX * E2M1_MAX / float(scale.min()) for name, scale in self.input_scales.items()}

    def parts(self, experts: range) -> Iterator[StackPart]:
        """Encode these experts, some at a time."""
        for name, members in self.members.items():
            stack: Tensor = getattr(self.memory, name)
            shared, elements = stack.shape[1], stack[0].numel()
            step = max(1, BATCH_ELEMENTS[stack.device.type] // elements)
            for start in range(experts.start, experts.stop, step):
                end = min(start + step, experts.stop)
                chosen = tuple(members[start * shared : end * shared])
                yield self._encode(stack[start:end], chosen, slice(start, end))

    def _encode(self, weight: Tensor, members: tuple[Member, ...], experts: slice) -> StackPart:
        exact = isinstance(members[0].module.weight_observer, ExactNvfp4Observer)
        if exact:
            found = nvfp4_scales(weight)
            block_scale, global_scale = found.block_scale, found.global_scale
        else:
            block_scale, global_scale = _minmax_scales(weight, members[0])
        block_scale = block_scale.flatten(0, 1)
        global_scale = global_scale.expand(-1, weight.shape[1]).reshape(-1)
        packed, sums = nvfp4_encode_measured(weight.flatten(0, 1), block_scale, global_scale, keep_negative_zero=exact)
        stored = {
            "weight_packed": packed,
            "weight_scale": block_scale.to(torch.float8_e4m3fn),
            "weight_global_scale": global_scale.reshape(-1, 1),
        }
        if self.input_scales:
            projections = [m.projection for m in members[: weight.shape[1]]]
            scales = [self.input_scales[projection][experts] for projection in projections]
            stored["input_global_scale"] = torch.stack(scales, dim=1).reshape(-1, 1)
        return StackPart(members, stored, sums)


def _is_known(member: Member) -> bool:
    """Whether scales and bytes of a member can be found without its modules' observers."""
    modules = member.module._modules
    inputs = modules.get("input_observer")
    return (
        member.is_nvfp4
        and type(modules.get("weight_observer")) in WEIGHT_OBSERVERS
        and modules.get("output_observer") is None
        and (inputs is None or type(inputs) is StaticMinMaxObserver)
    )


def _kind(member: Member) -> tuple[object, ...]:
    scheme = scheme_of(member.module)
    modules = member.module._modules
    return scheme.weights, scheme.input_activations, type(modules["weight_observer"]), "input_observer" in modules


def _observed_scale(ends: Tensor, seen: Tensor) -> Tensor:
    """F32 [E, 1] of BF16 ends [E, 2]: what `generate_gparam` of compressed-tensors makes of them, rounding included."""
    low, high = torch.clamp(ends[:, 0], max=0), torch.clamp(ends[:, 1], min=0)
    scale = _global_scale(torch.maximum(low.abs(), high.abs()))
    return torch.where(seen, scale, float("nan")).reshape(-1, 1)


def _global_scale(amax: Tensor) -> Tensor:
    """448 * 6 / amax, rounded to the dtype of `amax`, as F32; 1 where that is infinite."""
    found = E4M3_MAX * E2M1_MAX / torch.clamp(amax, min=torch.finfo(amax.dtype).tiny)
    return torch.nan_to_num(found, nan=1.0, posinf=1.0, neginf=1.0).to(torch.float32)


def _minmax_scales(weight: Tensor, member: Member) -> tuple[Tensor, Tensor]:
    """Block scales F32 [T, P, M, G] and global scales F32 [T, 1] of llmcompressor's `memoryless_minmax`."""
    low, high = torch.aminmax(torch.unflatten(weight, -1, (-1, NVFP4_GROUP)), dim=-1)
    amax = torch.maximum(-low.amin(dim=(1, 2, 3)), high.amax(dim=(1, 2, 3)))
    global_scale = _global_scale(amax).reshape(-1, 1)
    scale, _ = calculate_qparams(low, high, scheme_of(member.module).weights, global_scale.reshape(-1, 1, 1, 1))
    return scale.to(torch.float32), global_scale
