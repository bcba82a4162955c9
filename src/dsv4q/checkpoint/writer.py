"""Planned shards: header first, bytes at their offset, fsync, rename when whole.

A shard's header says where every tensor lies, so it is written when the shard is first touched and its tensors
are put in any order. Until its last tensor is on disk the file is called `.partial`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from dsv4q.checkpoint.journal import fsync_folder
from dsv4q.checkpoint.plan import Plan, PlannedShard
from dsv4q.errors import DiskError, OutputError


class ShardWriter:
    """Writes the tensors of a plan.

    Raises:
        OutputError: a shard that an earlier run left is not the planned one.
        DiskError: the disk refuses to take the bytes.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out = out
        self._place: dict[str, tuple[PlannedShard, int]] = {}
        self._size: dict[str, int] = {}
        for shard in plan.shards:
            for tensor, offset in shard.offsets():
                self._place[tensor.name] = (shard, offset)
                self._size[tensor.name] = tensor.nbytes
        self._missing = {s.file: {t.block for t in s.tensors} for s in plan.shards}
        """Blocks that still owe a shard their tensors."""
        self._shards = {s.file: s for s in plan.shards}
        self._open: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._digests: dict[str, str] = {}

    def put(self, name: str, data: memoryview | bytes | bytearray) -> None:
        """Write the bytes of one tensor at its planned place."""
        view = memoryview(data).cast("B")
        assert len(view) == self._size[name], f"{name}: {len(view)} bytes, planned {self._size[name]}"
        shard, offset = self._place[name]
        handle = self._handle(shard)
        digest = hashlib.sha256(view).hexdigest()
        try:
            while view:
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise DiskError("Writing a shard failed", where=self.out / shard.file, found=error.strerror) from error
        self._dirty.add(shard.file)
        self._digests[name] = digest

    def sync(self) -> str:
        """Make everything put since the last call durable; sha256 over those tensors' digests, by name."""
        for file in self._dirty:
            os.fsync(self._open[file])
        self._dirty.clear()
        total = hashlib.sha256("".join(f"{n} {d}\n" for n, d in sorted(self._digests.items())).encode()).hexdigest()
        self._digests.clear()
        return total

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
        if shard.file not in self._open:
            self._open[shard.file] = self._begin(shard)
        return self._open[shard.file]

    def _begin(self, shard: PlannedShard) -> int:
        handle = os.open(self._partial(shard), os.O_RDWR | os.O_CREAT, 0o644)
        os.fchmod(handle, 0o644)
        try:
            os.truncate(handle, shard.nbytes)
            os.pwrite(handle, shard.header, 0)
        except OSError as error:
            os.close(handle)
            raise DiskError("Creating a shard failed", where=self._partial(shard), found=error.strerror) from error
        return handle

    def close(self) -> None:
        """Close files; what was not synced may be lost."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


def check_finished_shards(out: Path, plan: Plan, done: Iterable[str]) -> None:
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


def write_sparse_shards(out: Path, plan: Plan) -> None:
    """The planned shards as sparse files: true headers, holes for data."""
    for shard in plan.shards:
        path = out / shard.file
        path.write_bytes(shard.header)
        os.truncate(path, shard.nbytes)
