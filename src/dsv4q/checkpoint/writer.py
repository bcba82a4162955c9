"""Planned shards: header first, bytes at their offset, fsync, rename when whole.

A shard's header says where every tensor lies, so it is written when the shard is first touched and its tensors
are put in any order. Until its last tensor is on disk the file is called `.partial`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv4q.checkpoint.files import BUFFERS, disk_errors, fsync, fsync_folder, make_readable, named, write_at
from dsv4q.checkpoint.pipes import Behind
from dsv4q.checkpoint.shards import PlannedShard, PlannedTensor, ShardPlan
from dsv4q.errors import OutputError

Data = memoryview | bytes | bytearray

WRITE_BEHIND = 4_000_000_000
"""Bytes that may wait to be written, a block's output: so the disk has work while the next block is computed."""

STEADY_BEHIND = 1_000_000_000
"""The same where tensors come one after another with nothing to compute in between: four times as much only holds more
memory, and is no faster (docs/log.md)."""

WRITE_THREADS = 6
"""sha256 takes 0.8 s a GB on one thread, and copying into the page cache half of that again."""

_FINISHING = 2
"""Blocks that are made durable or wait for it."""


def _of_linux(name: str) -> Any:
    """A function of the C library that only Linux has; None elsewhere."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform.startswith("linux") else None


_SYNC_FILE_RANGE = _of_linux("sync_file_range")
_SYNC_FILE_RANGE_WRITE = 2
_WORTH_A_CALL = 1 << 20


def _start_writing_back(handle: int, offset: int, length: int) -> None:
    """Have the system bring these bytes to the disk now, not when fsync asks.

    Left alone it waits until a tenth of the memory is dirty, and the disk idles until the fsync: half the time of a
    run that the disk limits (docs/log.md). The advice that pages are not needed (`posix_fadvise`) begins their
    write-back too, but then waits for every core of the machine to let go of them, one caller at a time.
    """
    if _SYNC_FILE_RANGE is not None and length >= _WORTH_A_CALL:
        _SYNC_FILE_RANGE(handle, ctypes.c_longlong(offset), ctypes.c_longlong(length), _SYNC_FILE_RANGE_WRITE)


def _allocate(handle: int, size: int) -> None:
    """Have the file system find room for the whole file now, where it can: it refuses early, and writes faster.

    Not `os.posix_fallocate`, which writes zeros where the file system has no such thing. Another rank may have done it.
    """
    fallocate = _of_linux("fallocate")
    if fallocate is None or os.fstat(handle).st_blocks * 512 >= size:
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    if fallocate(handle, 0, 0, size) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lay_out(handle: int, shard: PlannedShard) -> None:
    """Give an open file the mode, size and header of its shard."""
    make_readable(handle)
    os.truncate(handle, shard.nbytes)
    write_at(handle, [memoryview(shard.header)], 0)


class ShardWriter:
    """Writes the tensors of a plan. `put` and `sync` may be called from several threads.

    Args:
        on_whole: called by `finish_blocks` with each shard that just got its name.

    Raises:
        OutputError: a shard that an earlier run left is not the planned one.
        DiskError: the disk refuses to take the bytes.
    """

    def __init__(
        self, out: Path, plan: ShardPlan, on_whole: Callable[[PlannedShard], None] = lambda shard: None
    ) -> None:
        self.out = out
        self.names_shards = True
        """Whether `finish_blocks` gives whole shards their name; of several ranks one does."""
        self.to_sync: Callable[[Collection[str]], Collection[str]] = lambda files: files
        """Files that this process wrote for a block -> those that it is to make durable; of several ranks each calls it
        when it has written all, and it returns when all have."""
        self._on_whole = on_whole
        self._place: dict[str, tuple[PlannedShard, int]] = {}
        self._tensor: dict[str, PlannedTensor] = {}
        for shard in plan.shards:
            for tensor, offset in shard.offsets():
                self._place[tensor.name] = (shard, offset)
                self._tensor[tensor.name] = tensor
        self._missing = {s.file: {t.block for t in s.tensors} for s in plan.shards}
        """Blocks that still owe a shard their tensors."""
        self._shards = {s.file: s for s in plan.shards}
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        """Guards the open files and what follows."""
        self._written: dict[str, dict[str, str]] = defaultdict(dict)
        """Block -> its tensors that were put since its last sync, with their sha256."""

    def put(self, name: str, data: Data) -> None:
        """Write the bytes of one tensor at its planned place."""
        self.put_all([(name, data)])

    def put_all(self, tensors: Iterable[tuple[str, Data]]) -> None:
        """Write tensors at their planned places; those that lie side by side in a shard go in one call."""
        run: list[memoryview] = []
        last: tuple[PlannedShard, int, int] | None = None
        digests: dict[str, dict[str, str]] = defaultdict(dict)
        for name, data in tensors:
            view = memoryview(data).cast("B")
            planned = self._tensor[name]
            assert len(view) == planned.nbytes, f"{name}: {len(view)} bytes, planned {planned.nbytes}"
            shard, offset = self._place[name]
            if last is not None and (shard is not last[0] or offset != last[2] or len(run) == BUFFERS):
                self._write(last[0], run, last[1])
                last, run = None, []
            last = (shard, last[1] if last else offset, offset + len(view))
            run.append(view)
            digests[planned.block][name] = hashlib.sha256(view).hexdigest()
        if last is not None:
            self._write(last[0], run, last[1])
        with self._lock:
            for block, found in digests.items():
                self._written[block].update(found)

    def _write(self, shard: PlannedShard, views: list[memoryview], offset: int) -> None:
        handle = self._handle(shard)
        with disk_errors("Writing a shard failed", self.out / shard.file):
            write_at(handle, views, offset)
            _start_writing_back(handle, offset, sum(map(len, views)))

    def sync(self, block: str) -> dict[str, str]:
        """Make a block's tensors durable; the sha256 of each that was put since its last sync, by name."""
        with self._lock:
            written = self._written.pop(block, {})
        for file in self.to_sync({self._place[name][0].file for name in written}):
            with disk_errors("Writing a shard failed", self.out / file):
                fsync(self._open[file])
        return written

    def finish_blocks(self, blocks: Iterable[str]) -> list[str]:
        """Tell that `blocks` are durable; shards that are whole now get their name. Returns those files.

        `on_whole` is called with each of them, and from then on the file may be taken away.
        """
        done = set(blocks)
        whole = []
        for file, missing in list(self._missing.items()):
            missing -= done
            if missing:
                continue
            del self._missing[file]
            self._close(file)
            if self.names_shards and not (self.out / file).is_file():
                self._name(self._shards[file])
                whole.append(file)
                self._on_whole(self._shards[file])
        return whole

    def _close(self, file: str) -> None:
        with self._lock:
            handle = self._open.pop(file, None)
        if handle is not None:
            os.close(handle)

    def _name(self, shard: PlannedShard) -> None:
        partial = self._partial(shard)
        if not partial.is_file() or partial.stat().st_size != shard.nbytes:
            raise OutputError(
                "An unfinished shard is gone or was changed behind our back",
                where=partial,
                expected=f"{shard.nbytes} bytes",
                found=f"{partial.stat().st_size} bytes" if partial.is_file() else "no such file",
                hint="start over with --no-resume",
            )
        with named(partial):
            os.replace(partial, self.out / shard.file)
        fsync_folder(self.out)

    def _partial(self, shard: PlannedShard) -> Path:
        return self.out / f"{shard.file}.partial"

    def _handle(self, shard: PlannedShard) -> int:
        with self._lock:
            if shard.file not in self._open:
                self._open[shard.file] = self._begin(shard)
            return self._open[shard.file]

    def _begin(self, shard: PlannedShard) -> int:
        path = self._partial(shard)
        with disk_errors("Creating a shard failed", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lay_out(handle, shard)
                _allocate(handle, shard.nbytes)
            except BaseException:
                os.close(handle)
                raise
        return handle

    def close(self) -> None:
        """Close files; what was not synced may be lost."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


class BackgroundWriter:
    """Writes behind the computation: tensors from a few threads, and one block's fsync and journal line at a time.

    Args:
        budget: bytes that may wait to be written before `put` waits; one tensor is always allowed.

    `put` and `finish` may be called from several threads; blocks are finished in the order of the calls. An error in a
    thread is raised by the next `put` or `finish`, or at the end of the context.
    """

    def __init__(self, writer: ShardWriter, *, threads: int = WRITE_THREADS, budget: int = WRITE_BEHIND) -> None:
        self._writer = writer
        self._puts = Behind(threads, budget)
        # What is being finished gets finished even after an error, so that the journal has it.
        self._finishes = Behind(1, _FINISHING, completes=True)
        self._both = ExitStack()
        self._lock = threading.Lock()
        self._blocks: dict[str, list[Future[None]]] = defaultdict(list)

    def put(self, block: str, tensors: Sequence[tuple[str, Data]]) -> None:
        """Hand over the bytes of tensors of one block; they must not change any more."""
        self._finishes.raise_error()
        size = sum(memoryview(data).nbytes for _, data in tensors)
        written = self._puts.put(partial(self._writer.put_all, tensors), size)
        with self._lock:
            self._blocks[block].append(written)

    def finish(self, block: str, then: Callable[[Mapping[str, str], float], None]) -> None:
        """Make all that was put of `block` durable, then call `then` with its digests by tensor and the seconds.

        Returns at once, but not before the block finished last but one is done.
        """
        self._puts.raise_error()
        with self._lock:
            written = self._blocks.pop(block, [])
        self._finishes.put(partial(self._finish, block, written, then))

    def _finish(
        self, block: str, written: list[Future[None]], then: Callable[[Mapping[str, str], float], None]
    ) -> None:
        begin = time.perf_counter()
        for future in written:
            future.result()
        digests = self._writer.sync(block)
        then(digests, time.perf_counter() - begin)
        self._writer.finish_blocks([block])

    def __enter__(self) -> BackgroundWriter:
        self._both.enter_context(self._puts)
        self._both.enter_context(self._finishes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._both.__exit__(kind, error, trace)


def block_digest(digests: Mapping[str, str]) -> str:
    """sha256 over `name sha256` lines of a block's tensors, sorted by name."""
    return hashlib.sha256("".join(f"{n} {d}\n" for n, d in sorted(digests.items())).encode()).hexdigest()


def check_finished_shards(out: Path, plan: ShardPlan, done: Iterable[str]) -> None:
    """Refuse to resume into shards that are not the ones our journal speaks of.

    Raises:
        OutputError: a shard with finished tensors is missing or has another size or header.
    """
    finished = set(done)
    for shard in plan.shards:
        if not finished & {t.block for t in shard.tensors}:
            continue
        for path in (out / shard.file, out / f"{shard.file}.partial"):
            if path.is_file():
                break
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        same = path.is_file() and path.stat().st_size == shard.nbytes
        if same:
            with path.open("rb") as file:
                same = file.read(len(shard.header)) == shard.header
            found = "another header" if not same else found
        if not same:
            raise OutputError(
                "A shard of the unfinished run is not as it was left",
                where=path,
                expected=f"{shard.nbytes} bytes with the planned header",
                found=found,
                hint="start over with --no-resume",
            )


def write_sparse_shards(out: Path, plan: ShardPlan) -> None:
    """The planned shards as sparse files: true headers, holes for data.

    Raises:
        DiskError: the disk refuses to take them.
    """
    for shard in plan.shards:
        path = out / shard.file
        with disk_errors("Creating a shard failed", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lay_out(handle, shard)
            finally:
                os.close(handle)
