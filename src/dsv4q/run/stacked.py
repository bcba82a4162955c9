"""Routed experts of a block as stacks: their scales and encoded form, all at once instead of module by module.

For the schemes and observers that the stacks know; every other goes through its modules (`modules.py`), and both give
the same bits.

Shape letters: E experts, T tensors worked on together, P projections that share a global scale (w1, w3), M rows,
N columns, G = N / 16.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.observers.min_max import MemorylessMinMaxObserver, StaticMinMaxObserver
from torch import Tensor

from dsv4q.formats.convert import Each, Nvfp4, bf16_to_nvfp4, mxfp4_to_nvfp4
from dsv4q.formats.encode import E2M1_MAX, E4M3_MAX, NVFP4_GROUP
from dsv4q.formats.exact import nvfp4_scales
from dsv4q.formats.kernels import nvfp4_encode_measured
from dsv4q.layout import Role
from dsv4q.model.upstream import scheme_of
from dsv4q.run.experts import BatchedExperts
from dsv4q.run.linears import BATCH_ELEMENTS, EncodedLinears, InputScales, PlannedLinear, check_inputs
from dsv4q.run.memory import PROJECTIONS
from dsv4q.run.observers import ExactNvfp4Observer

CONVERTED_TOGETHER = 32
"""Experts at most that are converted at once, each by a thread; one takes 4.7 MB for each of its weights."""

WEIGHT_OBSERVERS = (ExactNvfp4Observer, MemorylessMinMaxObserver)


@dataclass(frozen=True)
class StackLayout:
    """Which linears of a block make its stacks."""

    linears: dict[str, list[PlannedLinear]]
    """`gate_up`: w1 and w3 of expert 0, of expert 1, and so on; `down`: w2."""

    @classmethod
    def of(cls, linears: Sequence[PlannedLinear]) -> StackLayout | None:
        """The routed experts among the linears of a block, or None if modules have to do."""
        routed = [linear for linear in linears if linear.spec.role == Role.ROUTED_EXPERT]
        places = {(*PROJECTIONS[linear.projection], linear.spec.expert): linear for linear in routed}
        experts = len(routed) // 3
        wanted = {
            "gate_up": [("gate_up", place, e) for e in range(experts) for place in (0, 1)],
            "down": [("down", 0, e) for e in range(experts)],
        }
        if not routed or {place for part in wanted.values() for place in part} != set(places):
            return None
        found = cls({name: [places[place] for place in part] for name, part in wanted.items()})
        uniform = all(_kind(linear) == _kind(part[0]) for part in found.linears.values() for linear in part)
        return found if uniform and all(_is_known(linear) for linear in routed) else None


@dataclass
class StackedLinears:
    """All routed experts of one block.

    Args:
        experts: their weights, and what the forward saw of their inputs.
    """

    layout: StackLayout
    experts: BatchedExperts
    _input_scales: dict[str, Tensor] = field(default_factory=dict)
    """Projection -> F32 [E, 1], where the scheme stores them."""

    # --------------------------------------------------------------------------------------------------- the scales

    def settle(self, inputs: InputScales) -> None:
        """See `Linears.settle`. The scales of the weights are found when they are encoded."""
        linears = self.layout.linears
        if not all("input_global_scale" in part[0].module._parameters for part in linears.values()):
            return
        count, device = len(self.experts.counts), self.experts.counts.device
        for projection in PROJECTIONS:
            if inputs.are_bounds:
                scales = torch.full((count, 1), E4M3_MAX * E2M1_MAX / inputs.bounds[projection], device=device)
            else:
                scales, without = inputs.settled(projection, self._observed(projection))
                inputs.unseen.update(without)
            self._input_scales[projection] = scales
            inputs.amax[projection] = E4M3_MAX * E2M1_MAX / float(scales.min())

    def _observed(self, projection: str) -> Tensor:
        """F32 [E, 1] of what the forward saw: NaN where no token came."""
        ends = self.experts.hidden_ends if projection == "w2" else self.experts.input_ends
        stack, _ = PROJECTIONS[projection]
        linears = [linear for linear in self.layout.linears[stack] if linear.projection == projection]
        seen = self.experts.seen
        check_inputs(linears, ends, seen)
        return _observed_scale(ends, seen)

    # ----------------------------------------------------------------------------------------------------- encoding

    def encoded(self, mine: Collection[str]) -> Iterator[EncodedLinears]:
        """See `Linears.encoded`; a rank has a run of experts."""
        memory, stacks = self.experts.memory, self.layout.linears
        elements = max(len(part) // memory.experts * math.prod(part[0].spec.shape) for part in stacks.values())
        step = min(memory.step, max(1, BATCH_ELEMENTS[memory.device.type] // elements))
        owned = [n for n in range(memory.experts) if stacks["down"][n].spec.name in mine]
        run = slice(owned[0], owned[-1] + 1) if owned else slice(0, 0)
        return self._converted_by_threads(run, step) if self._converts else self._one_ahead(run, step)

    def _one_ahead(self, run: slice, step: int) -> Iterator[EncodedLinears]:
        """Some of either stack in turn. Whether they are exact is asked once the next are under way.

        The answer waits its turn among the copies to the host, and who waits for it starts nothing.
        """
        before: _Begun | None = None
        for experts in _cut(run, step):
            for name in self.layout.linears:
                begun = self._begin(name, experts)
                if before is not None:
                    yield self._finished(before)
                before = begun
        if before is not None:
            yield self._finished(before)

    def _converted_by_threads(self, run: slice, step: int) -> Iterator[EncodedLinears]:
        """As many at a time as there are threads; what cannot be converted, `step` at a time."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, thread_name_prefix="dsv4q-convert") as pool:
            for experts in _cut(run, max(step, min(threads, CONVERTED_TOGETHER))):
                for name in self.layout.linears:
                    found = self._converted(name, experts, pool.map) or [
                        self._encoded(self._begin(name, some)) for some in _cut(experts, step)
                    ]
                    self.experts.memory.release(name, experts.stop)
                    yield from found

    @property
    def _converts(self) -> bool:
        """Whether exact NVFP4 can be made of the experts' bytes, on a CPU."""
        memory = self.experts.memory
        exact = all(part[0].is_exact for part in self.layout.linears.values())
        return exact and memory.packed and memory.device.type == "cpu"

    def _converted(self, name: str, experts: slice, each: Each) -> list[EncodedLinears]:
        """Experts of a stack, made of their bytes; one that is not exact, of its numbers. Empty if that cannot be."""
        stored = self.experts.memory.stored(name, experts)
        if stored is None or stored[0].dtype is torch.float8_e4m3fn:
            return []
        found = mxfp4_to_nvfp4(*stored, each)

        def part(some: slice) -> EncodedLinears:
            here = slice(some.start - experts.start, some.stop - experts.start)
            if not bool(found.exact[here].all()):
                return self._encoded(self._begin(name, some))
            scales = found.block_scale[here], found.global_scale[here]
            return self._as_stored(name, some, found.packed[here], *scales, found.sums[here])

        return [part(some) for some in ([experts] if bool(found.exact.all()) else _cut(experts, 1))]

    def _begin(self, name: str, experts: slice) -> _Begun:
        weight = self.experts.memory.weights(name, experts)
        straight = bf16_to_nvfp4(weight) if self.layout.linears[name][0].is_exact else None
        if straight is None:
            return _Begun(name, experts, weight, None)
        exact = straight.exact.all().to("cpu", non_blocking=True)
        known = torch.cuda.current_stream(weight.device).record_event() if weight.is_cuda else None
        return _Begun(name, experts, weight, straight, exact, known)

    def _finished(self, begun: _Begun) -> EncodedLinears:
        """Once they are encoded nothing more will be done with their weights."""
        found = self._encoded(begun)
        self.experts.memory.release(begun.stack, begun.experts.stop)
        return found

    def _encoded(self, begun: _Begun) -> EncodedLinears:
        name, experts, weight, straight = begun.stack, begun.experts, begun.weight, begun.straight
        if straight is not None and begun.is_exact():
            return self._as_stored(
                name, experts, straight.packed, straight.block_scale, straight.global_scale, straight.sums
            )
        first = self.layout.linears[name][0]
        if first.is_exact:
            found = nvfp4_scales(weight)
            block_scale, global_scale = found.block_scale, found.global_scale
        else:
            block_scale, global_scale = _minmax_scales(weight, first)
        shared = global_scale.expand(-1, weight.shape[1]).reshape(-1)
        packed, sums = nvfp4_encode_measured(
            weight.flatten(0, 1), block_scale.flatten(0, 1), shared, keep_negative_zero=first.is_exact
        )
        shape = weight.shape[:2]
        return self._as_stored(
            name, experts, packed.unflatten(0, shape), block_scale, global_scale, sums.unflatten(0, shape)
        )

    def _as_stored(
        self, name: str, experts: slice, packed: Tensor, block_scale: Tensor, global_scale: Tensor, sums: Tensor
    ) -> EncodedLinears:
        """All stored tensors of experts, of U8 [T, P, M, N/2], [T, P, M, G], F32 [T, 1] and F64 [T, P, 4]."""
        together = packed.shape[1]
        linears = tuple(self.layout.linears[name][experts.start * together : experts.stop * together])
        stored = {
            "weight_packed": packed.flatten(0, 1),
            "weight_scale": block_scale.flatten(0, 1).to(torch.float8_e4m3fn),
            "weight_global_scale": global_scale.expand(-1, together).reshape(-1, 1),
        }
        if self._input_scales:
            projections = [linear.projection for linear in linears[:together]]
            scales = [self._input_scales[projection][experts] for projection in projections]
            stored["input_global_scale"] = torch.stack(scales, dim=1).reshape(-1, 1)
        return EncodedLinears(linears, stored, sums.flatten(0, 1))


@dataclass(frozen=True)
class _Begun:
    """Experts of a stack on which the device is at work."""

    stack: str
    experts: slice
    weight: Tensor
    straight: Nvfp4 | None
    """What they are if all of them are exact; None: they have to go the ordinary way."""
    _exact: Tensor | None = None
    """Whether they are, BOOL [] of the host."""
    _known: torch.cuda.Event | None = None
    """From when on it is."""

    def is_exact(self) -> bool:
        """Waits until it is known."""
        if self._known is not None:
            self._known.synchronize()
        return bool(self._exact)


def _cut(experts: slice, step: int) -> Iterator[slice]:
    """Runs of `step` experts, the last one shorter."""
    return (slice(start, min(start + step, experts.stop)) for start in range(experts.start, experts.stop, step))


def _is_known(linear: PlannedLinear) -> bool:
    """Whether scales and bytes of a linear can be found without its module's observers."""
    modules = linear.module._modules
    inputs = modules.get("input_observer")
    return (
        linear.is_nvfp4
        and type(modules.get("weight_observer")) in WEIGHT_OBSERVERS
        and modules.get("output_observer") is None
        and (inputs is None or type(inputs) is StaticMinMaxObserver)
    )


def _kind(linear: PlannedLinear) -> tuple[object, ...]:
    scheme = scheme_of(linear.module)
    modules = linear.module._modules
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


def _minmax_scales(weight: Tensor, linear: PlannedLinear) -> tuple[Tensor, Tensor]:
    """Block scales F32 [T, P, M, G] and global scales F32 [T, 1] of llmcompressor's `memoryless_minmax`."""
    low, high = torch.aminmax(torch.unflatten(weight, -1, (-1, NVFP4_GROUP)), dim=-1)
    amax = torch.maximum(-low.amin(dim=(1, 2, 3)), high.amax(dim=(1, 2, 3)))
    global_scale = _global_scale(amax).reshape(-1, 1)
    scale, _ = calculate_qparams(low, high, scheme_of(linear.module).weights, global_scale.reshape(-1, 1, 1, 1))
    return scale.to(torch.float32), global_scale
