"""Blocks on their way from the source to the device: read on threads, copied on a stream of their own, one ahead.

What no forward pass and no encoder wants (embedding, head, MTP block) goes straight from the reader to the writer.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from dsv4q.checkpoint.pipes import loaded_ahead
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import WeightError
from dsv4q.formats.dtypes import tensor_bytes, torch_dtypes
from dsv4q.layout import Role, TensorSpec
from dsv4q.plan.work import Share
from dsv4q.run.experts import ExpertMemory

READ_THREADS = 8
"""A GPU needs its bytes faster than one thread copies them out of the page cache (2.2 s a block; 0.41 s with 8)."""


_POLL = 0.1
"""Seconds between two looks at whether the run is to stop."""

Put = Callable[[str, Sequence[tuple[str, memoryview]]], None]
"""Takes a block and tensors of it to be written as they are: output name and bytes."""


@dataclass(frozen=True)
class Item:
    """One tensor of the source and what is to be done with it."""

    spec: TensorSpec
    to_device: bool
    write_as: tuple[str, ...]
    """Names under which its bytes go into the artifact as they are; empty if another rank sees to that."""
    given: bool = False
    """Another rank reads it and sends it."""

    @property
    def is_read(self) -> bool:
        return bool(self.write_as) or (self.to_device and not self.given)


@dataclass
class LoadedBlock:
    """The tensors of one block on the device."""

    name: str
    tensors: dict[TensorSpec, torch.Tensor] = field(default_factory=dict)
    slot: ExpertMemory | None = None
    """Memory that the routed experts among `tensors` are views of."""
    ends: list[tuple[list[TensorSpec], torch.Tensor]] = field(default_factory=list)
    """Smallest and largest element [n, 2] of the floating-point tensors, NaN if one is NaN; on the device."""
    ready: torch.cuda.Event | None = None
    nbytes: int = 0

    @property
    def experts(self) -> ExpertMemory | None:
        """The slot, if there are routed experts in it."""
        return self.slot if any(spec.expert is not None for spec in self.tensors) else None

    def wait(self) -> None:
        """Let the current stream of the device wait until the tensors are there."""
        if self.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.ready)
            for tensor in (*(t for s, t in self.tensors.items() if s.expert is None), *(e for _, e in self.ends)):
                tensor.record_stream(stream)

    def check_finite(self, where: Callable[[TensorSpec], str]) -> None:
        """Refuse NaN and Inf; `where` names a tensor for people.

        Raises:
            WeightError: the first tensor that has one.
        """
        if not self.ends:
            return
        specs = [spec for part, _ in self.ends for spec in part]
        fine = torch.isfinite(torch.cat([ends.to(torch.float32) for _, ends in self.ends])).all(dim=1)
        if not bool(fine.all()):
            spec = specs[int((~fine).nonzero()[0])]
            raise _not_finite(self.tensors[spec], where(spec))


def _not_finite(tensor: torch.Tensor, where: str) -> WeightError:
    bad = (~torch.isfinite(tensor)).reshape(-1).nonzero()
    return WeightError(
        "A source tensor has NaN or Inf",
        where=where,
        expected="finite values",
        found=f"{len(bad)} of {tensor.numel()} values, the first at element {int(bad[0])}",
        hint="get this shard again; finished blocks are kept, and the same command resumes unless the repaired "
        "file looks like another source, in which case --no-resume starts over",
    )


@dataclass
class Loader:
    """Reads blocks in the order in which they are wanted.

    Args:
        budget: bytes on the host that may be read before they are wanted.
        memory: makes the memory for one block's routed experts; called once for each of `slots`.
        slots: blocks on the device at once, 1 or 2; with 2 a thread loads one while the other is worked on.
        put: takes what is to be written as it is.
    """

    source: Checkpoint
    device: torch.device
    budget: int
    memory: Callable[[], ExpertMemory]
    slots: int
    put: Put
    where: Callable[[TensorSpec], str]
    advance: Callable[[str, int], None]
    """Called with a block and its bytes that are done with because no computation wants them."""
    _free: queue.SimpleQueue[ExpertMemory | None] = field(default_factory=queue.SimpleQueue)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def blocks(
        self, wanted: Sequence[tuple[str, Sequence[Item]]], check_stop: Callable[[], None]
    ) -> Iterator[Iterator[LoadedBlock]]:
        """The wanted blocks, loaded; each must be given to `release` before the next but `slots - 1` comes.

        Raises (from the iterator):
            WeightError: NaN or Inf in a tensor that stays on the host.
            SourceError: the source cannot be read.
        """
        for _ in range(self.slots):
            self._free.put(None)
        items = [item for _, part in wanted for item in part if item.is_read]
        threads = READ_THREADS if self.device.type == "cuda" else 1
        with loaded_ahead(items, self._read, lambda i: i.spec.nbytes, budget=self.budget, threads=threads) as read:
            made = self._load(wanted, read)
            if self.slots == 1:
                yield made
                return
            ahead: queue.Queue[LoadedBlock | BaseException | None] = queue.Queue(maxsize=1)
            thread = threading.Thread(target=partial(self._run, made, ahead), name="dsv4q-load")
            thread.start()
            try:
                yield self._taken(ahead, check_stop)
            finally:
                self._stop.set()
                thread.join()

    def release(self, block: LoadedBlock) -> None:
        """Say that no more work on `block` will be queued on the current stream of the device."""
        block.tensors.clear()
        if block.slot is not None and self.device.type == "cuda":
            block.slot.freed = torch.cuda.current_stream(self.device).record_event()
        self._free.put(block.slot)

    def _read(self, item: Item) -> torch.Tensor:
        """One tensor on the host; for a GPU in pinned memory, from which copies run at full speed."""
        spec = item.spec
        if item.to_device and self.device.type == "cuda":
            tensor = torch.empty(spec.shape, dtype=torch_dtypes()[spec.dtype], pin_memory=True)
            self.source.read_into(spec.name, tensor.reshape(-1).view(torch.uint8).numpy().data)
            return tensor
        tensor = self.source.tensor(spec.name)
        ends = torch.aminmax(tensor) if not item.to_device and tensor.is_floating_point() else ()
        if not all(math.isfinite(float(end)) for end in ends):
            raise _not_finite(tensor, self.where(spec))
        return tensor

    def _load(
        self, wanted: Sequence[tuple[str, Sequence[Item]]], read: Iterator[tuple[Item, torch.Tensor]]
    ) -> Iterator[LoadedBlock]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for name, items in wanted:
            block = LoadedBlock(name, nbytes=sum(i.spec.nbytes for i in items))
            memory = self._take_slot()
            if self._stop.is_set():
                return
            with torch.cuda.stream(stream):
                for item in items:
                    tensor = None
                    if item.is_read:
                        found, tensor = next(read)
                        assert found is item, f"{item.spec.name} is wanted, {found.spec.name} comes"
                    memory = self._place(block, item, tensor, memory)
                    if self._stop.is_set():
                        return
                block.slot = memory
                if block.experts is not None:
                    block.ends.extend(block.experts.ends([i.spec for i in items if i.to_device and not i.given]))
                block.ready = stream.record_event() if stream is not None else None
            yield block

    def _take_slot(self) -> ExpertMemory | None:
        while True:
            try:
                return self._free.get(timeout=_POLL)
            except queue.Empty:
                if self._stop.is_set():
                    return None

    def _place(
        self, block: LoadedBlock, item: Item, tensor: torch.Tensor | None, memory: ExpertMemory | None
    ) -> ExpertMemory | None:
        """One tensor to where it is wanted; returns the slot's memory, which the first expert brings into being."""
        spec = item.spec
        if item.write_as and tensor is not None:
            self.put(block.name, [(name, tensor_bytes(tensor)) for name in item.write_as])
        if not item.to_device:
            self.advance(block.name, spec.nbytes)
            return memory
        if spec.role == Role.ROUTED_EXPERT:
            if memory is None:
                memory = self.memory()
            memory.wait_until_free()
            there = memory.view(spec)
            block.tensors[spec] = there if tensor is None else there.copy_(tensor, non_blocking=True)
            return memory
        assert tensor is not None
        there = tensor.to(self.device, non_blocking=True)
        block.tensors[spec] = there
        if there.is_floating_point():
            block.ends.append(([spec], torch.stack(torch.aminmax(there))[None]))
        return memory

    def _run(self, made: Iterator[LoadedBlock], ahead: queue.Queue[LoadedBlock | BaseException | None]) -> None:
        last: BaseException | None = None
        try:
            for block in made:
                self._hand_over(block, ahead)
        except BaseException as error:  # raised again where the block is wanted
            last = error
        self._hand_over(last, ahead)

    def _hand_over(
        self, what: LoadedBlock | BaseException | None, ahead: queue.Queue[LoadedBlock | BaseException | None]
    ) -> None:
        while not self._stop.is_set():
            try:
                return ahead.put(what, timeout=_POLL)
            except queue.Full:
                continue

    def _taken(
        self, ahead: queue.Queue[LoadedBlock | BaseException | None], check_stop: Callable[[], None]
    ) -> Iterator[LoadedBlock]:
        while True:
            check_stop()
            try:
                block = ahead.get(timeout=_POLL)
            except queue.Empty:
                continue
            if block is None:
                return
            if isinstance(block, BaseException):
                raise block
            yield block


def items_of(
    specs: Sequence[TensorSpec],
    kept: Mapping[TensorSpec, Sequence[str]],
    on_device: Callable[[TensorSpec], bool],
    share: Share,
    experts: int,
) -> dict[str, list[Item]]:
    """What to do with each tensor, by block.

    Args:
        specs: tensors of the source in the order of the plan.
        kept: names under which a tensor goes into the artifact as it is.
        share: this rank's.
        experts: routed experts of a block.
    """
    found: dict[str, list[Item]] = defaultdict(list)
    mine = share.experts(experts)
    for spec in specs:
        items = found[spec.block]
        used, given = on_device(spec), spec.expert is not None and spec.expert not in mine
        writes = not given if used and spec.expert is not None else share.has(len(items))
        items.append(Item(spec, used, tuple(kept.get(spec, ())) if writes else (), given))
    return found
