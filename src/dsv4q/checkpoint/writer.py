"""Planned shards: header first, bytes at their offset, fsync, rename when whole.

A shard's header says where every tensor lies, so it is written when the shard is first touched and its tensors
are put in any order. Until its last tensor is on disk the file is called `.partial`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from dsv4q.checkpoint.journal import fsync_folder
from dsv4q.checkpoint.plan import WRITE_BEHIND, PlannedShard, PlannedTensor, ShardPlan
from dsv4q.errors import DiskError, OutputError

_AGAIN = "make room, or see to the disk; then the same command goes on from there"


@contextmanager
def _disk_errors(what: str, where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(what, where=where, found=error.strerror, hint=_AGAIN) from error


def _write_at(handle: int, data: memoryview | bytes, offset: int) -> None:
    """pwrite may write less than it was given, on a disk that is nearly full for one."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _lay_out(handle: int, shard: PlannedShard) -> None:
    """Give an open file the mode, size and header of its shard."""
    os.fchmod(handle, 0o644)
    os.truncate(handle, shard.nbytes)
    _write_at(handle, shard.header, 0)


class ShardWriter:
    """Writes the tensors of a plan. `put` and `sync` may be called from several threads.

    Raises:
        OutputError: a shard that an earlier run left is not the planned one.
        DiskError: the disk refuses to take the bytes.
    """

    def __init__(self, out: Path, plan: ShardPlan) -> None:
        self.out = out
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

    def put(self, name: str, data: memoryview | bytes | bytearray) -> None:
        """Write the bytes of one tensor at its planned place."""
        view = memoryview(data).cast("B")
        planned = self._tensor[name]
        assert len(view) == planned.nbytes, f"{name}: {len(view)} bytes, planned {planned.nbytes}"
        shard, offset = self._place[name]
        handle = self._handle(shard)
        with _disk_errors("Writing a shard failed", self.out / shard.file):
            _write_at(handle, view, offset)
        digest = hashlib.sha256(view).hexdigest()
        with self._lock:
            self._written[planned.block][name] = digest

    def sync(self, block: str) -> str:
        """Make a block's tensors durable; sha256 over `name sha256` lines of them, sorted by name."""
        with self._lock:
            written = self._written.pop(block, {})
            handles = {file: self._open[file] for file in {self._place[name][0].file for name in written}}
        for file, handle in handles.items():
            with _disk_errors("Writing a shard failed", self.out / file):
                os.fsync(handle)
        return hashlib.sha256("".join(f"{n} {d}\n" for n, d in sorted(written.items())).encode()).hexdigest()

    def finish_blocks(self, blocks: Iterable[str]) -> list[str]:
        """Tell that `blocks` are durable; shards that are whole now get their name. Returns those files."""
        done = set(blocks)
        whole = []
        for file, missing in self._missing.items():
            missing -= done
            if not missing and not (self.out / file).is_file():
                self._complete(self._shards[file])
                whole.append(file)
        return whole

    def _complete(self, shard: PlannedShard) -> None:
        with self._lock:
            handle = self._open.pop(shard.file, None)
        if handle is not None:
            os.close(handle)
        partial = self._partial(shard)
        if not partial.is_file() or partial.stat().st_size != shard.nbytes:
            raise OutputError(
                "An unfinished shard is gone or was changed behind our back",
                where=partial,
                expected=f"{shard.nbytes} bytes",
                found=f"{partial.stat().st_size} bytes" if partial.is_file() else "no such file",
                hint="start over with --no-resume",
            )
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
        with _disk_errors("Creating a shard failed", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lay_out(handle, shard)
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

    An error in a thread is raised by the next `put`, by `finish`, or at the end of the context.
    """

    def __init__(self, writer: ShardWriter, *, threads: int = 4, budget: int = WRITE_BEHIND) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dsv4q-write")
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="dsv4q-sync")
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._behind = 0
        self._budget = budget
        self._block: list[Future[None]] = []
        self._finishing: Future[None] | None = None

    def put(self, name: str, data: memoryview | bytes | bytearray) -> None:
        """Hand over the bytes of one tensor; they must not change any more."""
        size = memoryview(data).nbytes
        while self._waiting and (self._behind + size > self._budget or self._waiting[0][1].done()):
            done, future = self._waiting.popleft()
            self._behind -= done
            future.result()
        future = self._pool.submit(self._writer.put, name, data)
        self._waiting.append((size, future))
        self._block.append(future)
        self._behind += size

    def finish(self, block: str, then: Callable[[str, float], None]) -> None:
        """Make all that was put since the last `finish` durable, then call `then` with its digest and the seconds.

        Returns at once, but not before the block finished last is done.
        """
        self._settle()
        futures, self._block = self._block, []
        self._finishing = self._finisher.submit(self._finish, block, futures, then)

    def _finish(self, block: str, futures: list[Future[None]], then: Callable[[str, float], None]) -> None:
        begin = time.perf_counter()
        for future in futures:
            future.result()
        digest = self._writer.sync(block)
        then(digest, time.perf_counter() - begin)
        self._writer.finish_blocks([block])

    def _settle(self) -> None:
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # What is being finished gets finished even after an error, so that the journal has it.
            if error is None:
                self._settle()
        finally:
            self._finisher.shutdown(wait=True)
            self._pool.shutdown(wait=True, cancel_futures=True)


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
        with _disk_errors("Creating a shard failed", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lay_out(handle, shard)
            finally:
                os.close(handle)
