"""Blocks on their way from the source to the device: read on threads, copied on a stream of their own, one ahead.

What no forward pass and no encoder wants (embedding, head, MTP block) goes straight from the reader to the writer.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from dsv4q.checkpoint.pipes import Stopped, loaded_ahead
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import WeightError
from dsv4q.formats.dtypes import tensor_bytes, torch_dtypes
from dsv4q.layout import Role, TensorSpec
from dsv4q.plan.work import TensorWork
from dsv4q.run.experts import ExpertMemory
from dsv4q.run.values import check_values

READ_THREADS = 8
"""A GPU needs its bytes faster than one thread copies them out of the page cache (2.2 s a block; 0.41 s with 8)."""

DECODED_TOGETHER = 16
"""Packed experts' weights that are decoded in one call: 270 MB of BF16 at full width, and temporaries of its size."""

Put = Callable[[str, Sequence[tuple[str, memoryview]]], None]
"""Takes a block and tensors of it to be written as they are: output name and bytes."""


@dataclass(frozen=True)
class BlockTask:
    """One block and what a rank is to do with it."""

    name: str
    work: tuple[TensorWork, ...]
    rank: int
    encode: bool
    """False: it is finished, and only computed once more for the residual streams behind it."""

    def reads(self, work: TensorWork) -> bool:
        """Whether this rank reads the tensor."""
        return work.is_read_by(self.rank) and (self.encode or work.computed)

    def keeps(self, work: TensorWork) -> tuple[str, ...]:
        """Names under which this rank writes the tensor's bytes."""
        return tuple(t.name for t in work.kept) if self.encode and work.rank == self.rank else ()

    @property
    def mine(self) -> frozenset[str]:
        """Weights that this rank encodes."""
        return frozenset(w.spec.name for w in self.work if w.encoded and w.rank == self.rank)

    @property
    def device_bytes(self) -> int:
        """Bytes of the tensors that are computed with, as BF16."""
        return sum(work.spec.nbytes for work in self.work if work.computed)


@dataclass
class LoadedBlock:
    """The tensors of one block on the device."""

    task: BlockTask
    tensors: dict[TensorSpec, torch.Tensor] = field(default_factory=dict)
    slot: ExpertMemory | None = None
    """Memory that the routed experts among `tensors` are views of."""
    ends: list[tuple[list[TensorSpec], torch.Tensor]] = field(default_factory=list)
    """Smallest and largest element [n, 2] of the floating-point tensors, NaN if one is NaN; on the device."""
    ready: torch.cuda.Event | None = None
    read_bytes: int = 0
    """Read from the source's files for it."""
    written_bytes: int = 0
    """Written as they are."""

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
        """Refuse NaN, Inf and what `check_values` does; `where` names a tensor for people.

        Raises:
            WeightError: the first such tensor.
        """
        if not self.ends:
            return
        specs = [spec for part, _ in self.ends for spec in part]
        every = torch.cat([ends.to(torch.float32) for _, ends in self.ends])
        fine = torch.isfinite(every).all(dim=1)
        if not bool(fine.all()):
            spec = specs[int((~fine).nonzero()[0])]
            raise _not_finite(self.tensors[spec], where(spec))
        check_values(specs, every, where)


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
class PackedExperts:
    """Experts' weights on the device as they lie in the files, decoded into their places some at a time.

    One at a time would keep the host busier with calls than the device with work.
    """

    source: Checkpoint
    _waiting: defaultdict[tuple[object, ...], list[tuple[str, list[torch.Tensor], torch.Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Those that are stored alike: name, what is stored, where it goes."""

    def add(self, spec: TensorSpec, stored: list[torch.Tensor], there: torch.Tensor) -> None:
        """One more; decodes those like it once there are enough.

        Raises:
            WeightError: as `decode`.
        """
        kind = tuple((part.shape, part.dtype) for part in stored)
        self._waiting[kind].append((spec.name, stored, there))
        if len(self._waiting[kind]) == DECODED_TOGETHER:
            self._decode(self._waiting.pop(kind))

    def decode(self) -> None:
        """Decode what still waits.

        Raises:
            WeightError: a packed weight stands for no number; names the tensor.
        """
        while self._waiting:
            self._decode(self._waiting.popitem()[1])

    def _decode(self, some: list[tuple[str, list[torch.Tensor], torch.Tensor]]) -> None:
        names, parts, places = zip(*some, strict=True)
        try:
            values = self.source.decoded(names[0], [torch.stack(alike) for alike in zip(*parts, strict=True)])
        except WeightError:
            for name, stored, _ in some:  # which one it is
                self.source.decoded(name, stored)
            raise
        for place, value in zip(places, values, strict=True):
            place.copy_(value)


@dataclass
class Loader:
    """Reads blocks in the order in which they are wanted.

    Args:
        budget: bytes on the host that may be read before they are wanted.
        memory: makes the memory for one block's routed experts; called once for each of `slots`.
        slots: blocks on the device at once, 1 or 2; with 2 one is loaded while the other is worked on.
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
    _free: list[ExpertMemory] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def blocks(self, wanted: Sequence[BlockTask], check_stop: Callable[[], None]) -> Iterator[Iterator[LoadedBlock]]:
        """The wanted blocks, loaded; each must be given to `release` before the next one is asked for.

        Raises (from the iterator):
            WeightError: NaN or Inf in a tensor that stays on the host.
            SourceError: the source cannot be read.
        """
        reads = [work for task in wanted for work in task.work if task.reads(work)]
        on_gpu = self.device.type == "cuda"
        threads, stream = READ_THREADS if on_gpu else 1, torch.cuda.Stream(self.device) if on_gpu else None
        with (
            loaded_ahead(reads, self._read, self._host_bytes, budget=self.budget, threads=threads) as read,
            loaded_ahead(
                wanted,
                partial(self._load, read, stream),
                lambda _: 1,
                budget=self.slots,
                threads=1,
                check_stop=check_stop,
            ) as loaded,
        ):
            try:
                yield (block for _, block in loaded)
            finally:
                self._stop.set()

    def release(self, block: LoadedBlock) -> None:
        """Say that no more work on `block` will be queued on the current stream of the device."""
        block.tensors.clear()
        if block.slot is not None:
            if self.device.type == "cuda":
                block.slot.freed = torch.cuda.current_stream(self.device).record_event()
            self._free.append(block.slot)

    def _read(self, work: TensorWork) -> tuple[torch.Tensor, ...]:
        """One tensor on the host; for a GPU as it lies in the files, unless its BF16 bytes are written too."""
        spec = work.spec
        if work.computed and self.device.type == "cuda":
            return self._pinned(spec) if work.kept else self.source.stored(spec.name, pinned=True)
        tensor = self.source.tensor(spec.name)
        ends = torch.aminmax(tensor) if not work.computed and tensor.is_floating_point() else ()
        if not all(math.isfinite(float(end)) for end in ends):
            raise _not_finite(tensor, self.where(spec))
        if ends:
            check_values([spec], torch.stack([end.to(torch.float32) for end in ends])[None], self.where)
        return (tensor,)

    def _pinned(self, spec: TensorSpec) -> tuple[torch.Tensor, ...]:
        tensor = torch.empty(spec.shape, dtype=torch_dtypes()[spec.dtype], pin_memory=True)
        self.source.read_into(spec.name, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return (tensor,)

    def _host_bytes(self, work: TensorWork) -> int:
        """What `_read` holds of one tensor."""
        packed = work.computed and not work.kept and self.device.type == "cuda"
        return work.source_bytes if packed else work.spec.nbytes

    def _load(
        self,
        read: Iterator[tuple[TensorWork, tuple[torch.Tensor, ...]]],
        stream: torch.cuda.Stream | None,
        task: BlockTask,
    ) -> LoadedBlock:
        block, packed = LoadedBlock(task), PackedExperts(self.source)
        with torch.cuda.stream(stream):
            for work in task.work:
                if self._stop.is_set():
                    raise Stopped
                parts: tuple[torch.Tensor, ...] = ()
                if task.reads(work):
                    found, parts = next(read)
                    assert found is work, f"{work.spec.name} is wanted, {found.spec.name} comes"
                    block.read_bytes += work.source_bytes
                self._keep(block, work, parts)
                if work.computed:
                    self._place(block, work.spec, parts, packed)
                else:
                    self.advance(task.name, work.spec.nbytes)
            packed.decode()
            if block.experts is not None:
                block.ends.extend(block.experts.ends([w.spec for w in task.work if w.computed and task.reads(w)]))
            block.ready = stream.record_event() if stream is not None else None
        return block

    def _keep(self, block: LoadedBlock, work: TensorWork, parts: tuple[torch.Tensor, ...]) -> None:
        """Have a tensor written as it is, if this rank does that."""
        names = block.task.keeps(work)
        if names:
            (tensor,) = parts
            self.put(block.task.name, [(name, tensor_bytes(tensor)) for name in names])
            block.written_bytes += len(names) * work.spec.nbytes

    def _place(
        self, block: LoadedBlock, spec: TensorSpec, parts: tuple[torch.Tensor, ...], packed: PackedExperts
    ) -> None:
        """One tensor to where it is wanted on the device; the first expert takes a slot.

        Raises:
            WeightError: what is packed stands for no number.
        """
        if spec.role == Role.ROUTED_EXPERT:
            if block.slot is None:
                block.slot = self._free.pop() if self._free else self.memory()
                block.slot.wait_until_free()
            block.tensors[spec] = there = block.slot.view(spec)
            if len(parts) == 1:
                there.copy_(parts[0], non_blocking=True)
            elif parts:
                packed.add(spec, [part.to(self.device, non_blocking=True) for part in parts], there)
            return
        moved = [part.to(self.device, non_blocking=True) for part in parts]
        block.tensors[spec] = there = self.source.decoded(spec.name, moved) if len(moved) > 1 else moved[0]
        if there.is_floating_point():
            block.ends.append(([spec], torch.stack(torch.aminmax(there))[None]))
