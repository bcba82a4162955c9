"""Memory for the routed experts of one block: as BF16, or packed as they lie in the files and decoded when wanted.

Packed they take a quarter, and so they travel from the disk to the device and from rank to rank. Who computes with
them asks for a run of experts and gets BF16, in the window that all blocks share. Where it holds all experts of a block
they are decoded once; on a small GPU it holds a few, and they are decoded again for every micro-batch: in the same
order, with the same bits.

Shape letters: E experts, P projections that lie together (w1 and w3; w2), F moe_intermediate_size, D hidden_size.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import entries_of
from dsv4q.checkpoint.pipes import Stopped
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.formats.native import decode_into, doubtful
from dsv4q.layout import Dims, TensorSpec
from dsv4q.run.ranks import Ranks
from dsv4q.run.values import LARGEST, are_usual

PROJECTIONS = {"w1": ("gate_up", 0), "w3": ("gate_up", 1), "w2": ("down", 0)}
"""Projection -> stack and place in its second dimension. w1 and w3 lie side by side: they share a global scale."""
STACKS = ("gate_up", "down")

_POLL = 0.1
"""Seconds between two looks at whether a place is still wanted."""

Stacks = dict[str, Tensor]
"""`gate_up` [E, 2, F, D], w1 and w3, and `down` [E, 1, D, F], w2."""


def place_of(spec: TensorSpec) -> tuple[str, int, int]:
    """Stack, expert and projection of an expert's weight."""
    stack, projection = PROJECTIONS[spec.module.rpartition(".")[2]]
    assert spec.expert is not None
    return stack, spec.expert, projection


class ExpertMemory(ABC):
    """Memory for the routed experts of one block; block after block uses it.

    The next block comes in expert by expert, on the thread that loads, as soon as each one's place is free.

    Attributes:
        experts: E.
        step: experts that can be had at once.
        packed: they lie here as in the files.
    """

    packed = False

    def __init__(self, experts: int, step: int, device: torch.device) -> None:
        self.experts, self.step, self.device = experts, step, device
        self._change = threading.Condition()
        """Guards what follows; notified when places become free."""
        self._free = dict.fromkeys(STACKS, experts)
        """Stack -> the first so many experts may be overwritten."""
        self._freed: torch.cuda.Event | None = None
        """Since when, on the device."""
        self._released = dict.fromkeys(STACKS, experts)
        """Stack -> so many experts of the block that is worked on have been released."""

    # ---------------------------------------------------------------------------------------- by the thread that loads

    def place(self, specs: Sequence[TensorSpec], stored: Sequence[Tensor], is_stopped: Callable[[], bool]) -> None:
        """Put weights here, from the host or the device, on the current stream; waits until their places are free.

        Args:
            specs: one projection of consecutive experts.
            stored: [n, ...], themselves, or where experts stay packed packed weights and their scales.
            is_stopped: whether nobody wants them any more.

        Raises:
            Stopped: nobody does.
        """
        stack, first, projection = place_of(specs[0])
        end = first + len(specs)
        with self._change:
            while not self._change.wait_for(lambda: self._free[stack] >= end, timeout=_POLL):
                if is_stopped():
                    raise Stopped
            if self._freed is not None:
                torch.cuda.current_stream(self.device).wait_event(self._freed)
        for there, part in zip(self._parts(stack), stored, strict=True):
            there[first:end, projection].copy_(part.view(there.dtype), non_blocking=True)

    def keep(self) -> None:
        """All of a block is here; nothing of it may be overwritten until it is released."""
        with self._change:
            self._free = dict.fromkeys(STACKS, 0)

    @abstractmethod
    def fine(self, specs: Sequence[TensorSpec]) -> Tensor:
        """Which of the placed weights need no closer look, see `check_values`; Bool [len(specs)] on the device."""

    @abstractmethod
    def _parts(self, stack: str) -> list[Tensor]:
        """What lies here of a stack: [E, P, ...] of the weights, or of packed weights and their scales."""

    # ---------------------------------------------------------------------------------------- by the thread that works

    def begin(self) -> None:
        """The block that is kept here is worked on from now on."""
        self._released = dict.fromkeys(STACKS, 0)

    def release(self, stack: str, experts: int) -> None:
        """Say that no more work on the first `experts` of a stack will be queued on the device's current stream."""
        if experts <= self._released[stack]:  # the next block may be there already
            return
        self._released[stack] = experts
        with self._change:
            self._free[stack] = experts
            if self.device.type == "cuda":
                self._freed = torch.cuda.current_stream(self.device).record_event()
            self._change.notify_all()

    def release_all(self) -> None:
        """The same of all experts."""
        for stack in STACKS:
            self.release(stack, self.experts)

    def parts(self) -> Iterator[slice]:
        """All experts in order, as many at a time as can be had at once."""
        return (slice(start, min(start + self.step, self.experts)) for start in range(0, self.experts, self.step))

    @abstractmethod
    def weights(self, stack: str, experts: slice) -> Tensor:
        """BF16 [n, P, ...] of at most `step` experts; valid until others of this stack are asked for."""

    def stored(self, stack: str, experts: slice) -> tuple[Tensor, Tensor] | None:
        """Weights and scales [n, P, ...] of experts as they lie in the files; None if they do not, or do no longer."""
        return None

    @abstractmethod
    def exchange(self, ranks: Ranks) -> None:
        """Have every rank give the experts that it has placed."""

    def weight(self, spec: TensorSpec) -> Tensor:
        """One weight among those that can be had at once."""
        stack, expert, projection = place_of(spec)
        assert self.step == self.experts
        return self.weights(stack, slice(0, self.experts))[expert, projection]


class WideExperts(ExpertMemory):
    """Experts as BF16."""

    def __init__(self, stacks: Stacks) -> None:
        weight = stacks["gate_up"]
        super().__init__(len(weight), len(weight), weight.device)
        self._stacks = stacks

    def _parts(self, stack: str) -> list[Tensor]:
        return [self._stacks[stack]]

    def weights(self, stack: str, experts: slice) -> Tensor:
        return self._stacks[stack][experts]

    def exchange(self, ranks: Ranks) -> None:
        for stack in self._stacks.values():
            ranks.exchange(stack)

    def fine(self, specs: Sequence[TensorSpec]) -> Tensor:
        ends = {
            name: torch.stack(torch.aminmax(stack.flatten(2), dim=-1), dim=-1) for name, stack in self._stacks.items()
        }
        return _of({name: are_usual(both.flatten(0, 1)).view(both.shape[:2]) for name, both in ends.items()}, specs)


@dataclass
class Window:
    """BF16 memory in which packed experts are decoded, for one block after another."""

    stacks: Stacks
    holds: dict[str, tuple[object, slice]] = field(default_factory=dict)
    """Stack -> the memory whose experts are in it, and which."""

    def forget(self, memory: object) -> None:
        """Another block comes into this memory."""
        self.holds = {stack: held for stack, held in self.holds.items() if held[0] is not memory}


class PackedExperts(ExpertMemory):
    """Experts as they lie in the files of a native checkpoint, all of them in one form.

    Args:
        entries: what is stored of one weight of each stack: the packed weight and its scale.
    """

    packed = True

    def __init__(
        self,
        experts: int,
        entries: Mapping[str, Sequence[TensorEntry]],
        window: Window,
        device: torch.device,
    ) -> None:
        super().__init__(experts, len(window.stacks["gate_up"]), device)
        self._window = window
        self._stored = {
            stack: [
                torch.empty((experts, places, *entry.shape), dtype=torch_dtypes()[entry.dtype], device=device)
                for entry in entries[stack]
            ]
            for stack, places in (("gate_up", 2), ("down", 1))
        }

    def begin(self) -> None:
        self._window.forget(self)
        super().begin()

    def _parts(self, stack: str) -> list[Tensor]:
        return self._stored[stack]

    def weights(self, stack: str, experts: slice) -> Tensor:
        wanted = slice(0, self.experts) if self.step == self.experts else experts
        there = self._window.stacks[stack][: wanted.stop - wanted.start]
        if self._window.holds.get(stack) != (self, wanted):
            weight, scale = (part[wanted].flatten(0, 1) for part in self._stored[stack])
            decode_into(weight, scale, there.flatten(0, 1))
            self._window.holds[stack] = (self, wanted)
            if len(there) == self.experts:
                self.release(stack, self.experts)
        return there[experts.start - wanted.start : experts.stop - wanted.start]

    def stored(self, stack: str, experts: slice) -> tuple[Tensor, Tensor] | None:
        weight, scale = self._stored[stack]
        return None if self._released[stack] > experts.start else (weight[experts], scale[experts])

    def exchange(self, ranks: Ranks) -> None:
        for stored in self._stored.values():
            for part in stored:
                ranks.exchange(part.view(torch.uint8))

    def fine(self, specs: Sequence[TensorSpec]) -> Tensor:
        doubts = {}
        for stack, stored in self._stored.items():
            weight, scale = (part.flatten(0, 1) for part in stored)
            doubts[stack] = doubtful(weight, scale, LARGEST).unflatten(0, (self.experts, -1))
        return ~_of(doubts, specs)


def _of(found: Stacks, specs: Iterable[TensorSpec]) -> Tensor:
    """Those elements of [E, P] that belong to the weights."""
    places = [place_of(spec) for spec in specs]
    values = [found[stack].reshape(-1) for stack in STACKS]
    starts = {"gate_up": 0, "down": len(values[0])}
    at = [starts[stack] + expert * found[stack].shape[1] + projection for stack, expert, projection in places]
    return torch.cat(values)[at]


def memory_maker(
    source: Checkpoint, dims: Dims, experts: Sequence[str], device: torch.device, *, packed: bool, step: int
) -> Callable[[], ExpertMemory]:
    """What makes memory for blocks of these dimensions.

    Args:
        experts: names of the routed experts' weights of one block.
        packed: they stay as they lie in the files, which is the same for all of them.
        step: experts that are BF16 at once, if they stay packed.
    """
    if not packed:
        return lambda: WideExperts(_stacks(dims, dims.experts, device))
    entries = {PROJECTIONS[name.split(".")[-2]][0]: entries_of(source, name) for name in experts}
    window = Window(_stacks(dims, step, device))
    return lambda: PackedExperts(dims.experts, entries, window, device)


def _stacks(dims: Dims, experts: int, device: torch.device) -> Stacks:
    """Uninitialised."""
    shape = (dims.moe_intermediate, dims.hidden)
    return {
        "gate_up": torch.empty((experts, 2, *shape), dtype=torch.bfloat16, device=device),
        "down": torch.empty((experts, 1, *reversed(shape)), dtype=torch.bfloat16, device=device),
    }
