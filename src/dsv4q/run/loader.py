"""Blocks on their way from the source to the device: read on threads, copied on a stream of their own, one ahead.

A tensor of theirs that no forward pass and no encoder wants goes straight from the reader to the writer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from dsv4q.checkpoint.alike import stored_kind
from dsv4q.checkpoint.pipes import Behind, Stopped, loaded_ahead
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.formats.dtypes import tensor_bytes, torch_dtypes
from dsv4q.host import cores
from dsv4q.layout import Role, TensorSpec
from dsv4q.plan.work import TensorWork
from dsv4q.run.memory import ExpertMemory, place_of
from dsv4q.run.values import are_usual, check_values, ends_of

READ_THREADS = 8
"""One thread copies out of the page cache more slowly than a GPU, or a CPU of several cores, wants bytes: 2.2 s a block
for a GPU; 0.41 s with 8."""

BESIDE = 2
"""Threads that read beside a GPU's work as long as it waits for none of them. Eight that copy out of the page cache
leave the thread that starts the GPU's work so little of the machine that a forward of 0.70 s takes 0.86 to 0.93; two
read a block in less than it takes, and it stays 0.71 to 0.83 (two H100 machines of 16 cores)."""

TOGETHER = 128 << 20
"""Bytes of experts' weights that are read and copied in one piece. One by one they would keep Python so busy that the
thread that starts the device's work waits for it: a forward of 0.7 s took 1.8 beside the reading of the next block."""

Piece = tuple[tuple[TensorWork, ...], ...]
"""What is read together: one tensor, or of consecutive experts that are stored alike each projection's weights. In the
files an expert's tensors lie side by side, so such a piece takes few calls of the system."""

Rows = Sequence[tuple[torch.Tensor, ...]]
"""Of each row of a piece what lies in the files: itself, or packed weights and their scales, [n, ...] of experts."""

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


class Pace:
    """How many threads may read at once.

    Args:
        threads: that there are.
        allowed: of them, at first.
    """

    def __init__(self, threads: int, allowed: int) -> None:
        self.threads, self.allowed = threads, min(threads, allowed)
        self._reading = 0
        self._change = threading.Condition()
        """Guards what is above; notified when a thread may begin."""

    def __enter__(self) -> None:
        with self._change:
            self._change.wait_for(lambda: self._reading < self.allowed)
            self._reading += 1

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._reading -= 1
            self._change.notify()

    def allow(self, threads: int) -> None:
        """From now on so many threads, as far as there are."""
        with self._change:
            self.allowed = min(threads, self.threads)
            self._change.notify_all()


@dataclass
class LoadedBlock:
    """The tensors of one block on the device."""

    task: BlockTask
    source: Checkpoint
    tensors: dict[TensorSpec, torch.Tensor] = field(default_factory=dict)
    """All but those of routed experts."""
    memory: ExpertMemory | None = None
    """Where the routed experts are, if there are any."""
    experts: list[TensorSpec] = field(default_factory=list)
    """Weights of routed experts that are, or will be once the ranks have exchanged theirs, in `memory`."""
    checked: list[tuple[list[TensorSpec], torch.Tensor]] = field(default_factory=list)
    """Which of the tensors that this rank has read need no closer look: Bool [n], on the device."""
    ready: torch.cuda.Event | None = None
    read_bytes: int = 0
    """Read from the source's files for it."""
    written_bytes: int = 0
    """Written as they are."""

    def begin(self) -> None:
        """Begin with the block: the current stream of the device waits until its tensors are there."""
        if self.memory is not None:
            self.memory.begin()
        if self.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.ready)
            for tensor in (*self.tensors.values(), *(fine for _, fine in self.checked)):
                tensor.record_stream(stream)

    def check_finite(self, *, sizes: bool = True) -> None:
        """Refuse NaN, Inf and, if `sizes`, what `check_values` does besides.

        Raises:
            WeightError: the first tensor that has one, or that is packed and stands for no number.
        """
        if not self.checked:
            return
        specs = [spec for part, _ in self.checked for spec in part]
        fine = torch.cat([fine for _, fine in self.checked]).tolist()
        for spec in (spec for spec, good in zip(specs, fine, strict=True) if not good):
            tensor = self.source.tensor(spec.name)  # it may be gone from the device
            check_values(self.source, spec, tensor, sizes=sizes)


@dataclass
class Loader:
    """Reads blocks in the order in which they are wanted.

    Args:
        budget: bytes on the host that may be read before they are wanted.
        memory: makes the memory for one block's routed experts; called as often as there are `memories`.
        memories: of which blocks take one in turn; with one, the next block's experts wait for places.
        put: takes what is to be written as it is.
    """

    source: Checkpoint
    device: torch.device
    budget: int
    memory: Callable[[], ExpertMemory]
    memories: int
    put: Put
    advance: Callable[[str, int], None]
    """Called with a block and its bytes that are done with because no computation wants them."""
    _made: deque[ExpertMemory] = field(default_factory=deque)
    """That which is used next comes first."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _wanted: threading.Event = field(default_factory=threading.Event)
    """Somebody waits for blocks; before, they come in beside imports, whose thread many others would keep waiting."""
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self._pace = Pace(READ_THREADS if self.device.type == "cuda" else min(READ_THREADS, cores()), BESIDE)

    @contextmanager
    def blocks(self, wanted: Sequence[BlockTask], check_stop: Callable[[], None]) -> Iterator[Iterator[LoadedBlock]]:
        """The wanted blocks, loaded; each must be given to `release` before the next one is asked for.

        The first ones are read from now on, whenever they are asked for.

        Raises (from the iterator):
            WeightError: NaN or Inf in a tensor that stays on the host.
            SourceError: the source cannot be read.
        """
        pieces = {task.name: self._pieces(task) for task in wanted}
        reads = [piece for some in pieces.values() for piece in some]
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if on_gpu else None
        with (
            loaded_ahead(reads, self._read, self._host_bytes, budget=self.budget, threads=self._pace.threads) as read,
            loaded_ahead(
                wanted,
                partial(self._load, read, pieces, stream),
                lambda _: 1,
                budget=2 if on_gpu else 1,
                threads=1,
                check_stop=partial(self._wait, check_stop),
            ) as loaded,
            Behind(1, 1) as beside,
        ):
            try:
                blocks = (block for _, block in loaded)
                first = beside.put(partial(next, blocks, None))
                yield self._paced(_beginning_with(first, blocks))
            finally:
                self._stop.set()

    def _paced(self, loaded: Iterator[LoadedBlock]) -> Iterator[LoadedBlock]:
        """The blocks. The first decoder block is waited for whatever reads it; what comes next is read beside work."""
        self._wanted.set()
        self._pace.allow(self._pace.threads)
        on_the_way = self.device.type == "cuda"
        for block in loaded:
            if on_the_way and block.memory is not None:
                on_the_way = False
                self._pace.allow(BESIDE)
            yield block

    def _wait(self, check_stop: Callable[[], None]) -> None:
        """A block has been waited for, for a tenth of a second and then again."""
        if self._wanted.is_set():
            self._pace.allow(2 * self._pace.allowed)
        check_stop()

    def release(self, block: LoadedBlock) -> None:
        """Say that no more work on `block` will be queued on the current stream of the device."""
        block.tensors.clear()
        if block.memory is not None:
            block.memory.release_all()

    def _pieces(self, task: BlockTask) -> list[Piece]:
        """What is read for a block, experts in their order."""
        found: list[Piece] = []
        experts: dict[int, list[TensorWork]] = {}
        for work in filter(task.reads, task.work):
            if _is_experts(work):
                experts.setdefault(place_of(work.spec)[1], []).append(work)
            else:
                found.append(((work,),))
        run: list[list[TensorWork]] = []
        last: object = None
        for expert, works in experts.items():
            kind = [(place_of(work.spec)[::2], stored_kind(self.source, work.spec.name)) for work in works]
            nbytes = (len(run) + 1) * sum(work.source_bytes for work in works)
            if run and (last != (expert - 1, kind) or nbytes > TOGETHER):
                found.append(tuple(zip(*run, strict=True)))
                run = []
            run.append(works)
            last = expert, kind
        return [*found, tuple(zip(*run, strict=True))] if run else found

    def _read(self, piece: Piece) -> Rows:
        """A piece on the host; as it lies in the files if it is computed with and its BF16 bytes are not written."""
        with self._pace:
            return self._read_now(piece)

    def _read_now(self, piece: Piece) -> Rows:
        on_gpu = self.device.type == "cuda"
        work = piece[0][0]
        spec = work.spec
        if _is_experts(work):
            return self.source.stored_rows([[w.spec.name for w in row] for row in piece], pinned=on_gpu)
        if work.computed and not work.kept:
            return [self.source.stored(spec.name, pinned=on_gpu)]
        if work.computed and on_gpu:
            return [self._pinned(spec)]
        return [(self.source.tensor(spec.name) if work.computed else read_to_copy(self.source, spec),)]

    def _pinned(self, spec: TensorSpec) -> tuple[torch.Tensor, ...]:
        tensor = torch.empty(spec.shape, dtype=torch_dtypes()[spec.dtype], pin_memory=True)
        self.source.read_into(spec.name, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return (tensor,)

    def _host_bytes(self, piece: Piece) -> int:
        """What `_read` holds of a piece."""
        works = (work for row in piece for work in row)
        return sum(w.source_bytes if w.computed and not w.kept else w.spec.nbytes for w in works)

    def _load(
        self,
        loaded: Iterator[tuple[Piece, Rows]],
        pieces: Mapping[str, Sequence[Piece]],
        stream: torch.cuda.Stream | None,
        task: BlockTask,
    ) -> LoadedBlock:
        block = LoadedBlock(task, self.source)
        with torch.cuda.stream(stream):
            for piece in pieces[task.name]:
                if self._stop.is_set():
                    raise Stopped
                found, rows = next(loaded)
                work = piece[0][0]
                assert found is piece, f"{work.spec.name} is wanted, {found[0][0].spec.name} comes"
                block.read_bytes += sum(w.source_bytes for row in piece for w in row)
                if _is_experts(work):
                    for row, parts in zip(piece, rows, strict=True):
                        self._place_experts(block, [w.spec for w in row], parts)
                    continue
                (parts,) = rows
                self._keep(block, work, parts)
                if work.computed:
                    self._place(block, work.spec, parts)
            self._done_without(task)
            experts = [work for work in task.work if work.computed and work.spec.role == Role.ROUTED_EXPERT]
            block.experts = [work.spec for work in experts]
            read = [work.spec for work in experts if task.reads(work)]
            if block.memory is not None:
                if read:
                    block.checked.append((read, block.memory.fine(read)))
                block.memory.keep()
            block.ready = stream.record_event() if stream is not None else None
        return block

    def _done_without(self, task: BlockTask) -> None:
        """Tell of the bytes that no computation wants."""
        rest = sum(work.spec.nbytes for work in task.work if not work.computed)
        if rest:
            self.advance(task.name, rest)

    def _keep(self, block: LoadedBlock, work: TensorWork, parts: tuple[torch.Tensor, ...]) -> None:
        """Have a tensor written as it is, if this rank does that."""
        names = block.task.keeps(work)
        if names:
            (tensor,) = parts
            self.put(block.task.name, [(name, tensor_bytes(tensor)) for name in names])
            block.written_bytes += len(names) * work.spec.nbytes

    def _place(self, block: LoadedBlock, spec: TensorSpec, parts: tuple[torch.Tensor, ...]) -> None:
        """One tensor to where it is wanted on the device.

        Raises:
            WeightError: what is packed stands for no number.
        """
        if spec.role == Role.ROUTED_EXPERT:  # one that is written as BF16 besides
            self._place_experts(block, [spec], tuple(part[None] for part in parts))
            return
        block.tensors[spec] = there = self._decoded(spec, parts)
        if there.is_floating_point():
            block.checked.append(([spec], are_usual(ends_of(there))))

    def _place_experts(self, block: LoadedBlock, specs: list[TensorSpec], parts: tuple[torch.Tensor, ...]) -> None:
        """Weights [n, ...] of one projection of experts; the first takes memory for all.

        Raises:
            WeightError: what is packed, and has to be decoded for that memory, stands for no number.
        """
        memory = self._memory_of(block)
        if len(parts) > 1 and not memory.packed:
            moved = [part.to(self.device, non_blocking=True) for part in parts]
            parts = (self.source.decoded_together([spec.name for spec in specs], moved),)
        memory.place(specs, parts, self._stop.is_set)

    def _memory_of(self, block: LoadedBlock) -> ExpertMemory:
        if block.memory is None:
            if len(self._made) < self.memories:
                self._made.appendleft(self.memory())
            block.memory = self._made[0]
            self._made.rotate(-1)
        return block.memory

    def _decoded(self, spec: TensorSpec, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        moved = [part.to(self.device, non_blocking=True) for part in parts]
        return self.source.decoded(spec.name, moved) if len(moved) > 1 else moved[0]


def _beginning_with(first: Future[LoadedBlock | None], others: Iterator[LoadedBlock]) -> Iterator[LoadedBlock]:
    block = first.result()
    if block is not None:
        yield block
        yield from others


def _is_experts(work: TensorWork) -> bool:
    """Whether it is an expert's weight that goes to the device with others, as it lies in the files."""
    return work.computed and not work.kept and work.spec.role == Role.ROUTED_EXPERT


def read_to_copy(source: Checkpoint, spec: TensorSpec) -> torch.Tensor:
    """A tensor whose bytes are written as they are, and that no computation will look at.

    Raises:
        WeightError: no model has such values.
    """
    tensor = source.tensor(spec.name)
    if tensor.is_floating_point() and not bool(are_usual(ends_of(tensor))):
        check_values(source, spec, tensor)
    return tensor
