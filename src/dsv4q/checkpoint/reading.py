"""Bytes of tensors out of a checkpoint's files, which stay open: what lies side by side comes in one system call.

Each call gives Python up and waits for it again, behind the thread that starts a GPU's work, or before it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dsv4q.checkpoint.files import AGAIN, fill, open_regular
from dsv4q.checkpoint.headers import TensorEntry, shown
from dsv4q.errors import SourceError

IN_ONE_CALL = 32 << 20
"""Bytes of several tensors that are read in one call: who wants to stop waits for its end."""

Place = tuple[TensorEntry, memoryview]
"""A tensor, or the end of one, and the buffer (bytes) for it."""


class OpenFiles:
    """Open files of one checkpoint, shared by reading threads (preadv has no file position to share)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[int, Path]] = {}

    def read(self, root: Path, sizes: Mapping[str, int], places: Sequence[Place]) -> None:
        """Read whole tensors, in the order in which they lie in the files.

        Args:
            sizes: bytes of each file when its header was read.

        Raises:
            SourceError: as `fill`.
        """
        for run in _side_by_side(places):
            self.fill(root, sizes, run, run[0][0].start)

    def fill(self, root: Path, sizes: Mapping[str, int], run: Sequence[Place], offset: int) -> None:
        """Read what lies side by side in one file, from `offset` on.

        Raises:
            SourceError: the file changed or ends early, the disk fails.
        """
        file = run[0][0].file
        handle, path = self.get(root, file, sizes[file])
        count = fill(handle, [buffer for _, buffer in run], offset, path)
        for entry, buffer in run:
            if count < len(buffer):
                raise SourceError(
                    "A shard ends inside a tensor",
                    where=f"{path}: {shown(entry.name)}",
                    expected=f"{len(buffer):,} bytes from offset {offset:,}",
                    found=f"{count:,} bytes",
                    hint=AGAIN,
                )
            count, offset = count - len(buffer), offset + len(buffer)

    def get(self, root: Path, file: str, size: int) -> tuple[int, Path]:
        """The descriptor of a file that has so many bytes, and where it lies.

        Raises:
            SourceError: it has not, or cannot be opened.
        """
        with self._lock:
            if file not in self._open:
                path = root / file
                handle, now = open_regular(path)
                if now != size:
                    os.close(handle)
                    raise SourceError(
                        "A shard changed while it was in use",
                        where=path,
                        expected=f"{size:,} bytes, as when its header was read",
                        found=f"{now:,} bytes",
                        hint="leave the source alone during a run, then start again",
                    )
                self._open[file] = handle, path
            return self._open[file]

    def close(self) -> None:
        """Close them all; no read may be under way."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()


def _side_by_side(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Runs of tensors, each of which begins where the one before ends; of `IN_ONE_CALL` bytes if there are several."""
    run: list[Place] = []
    for entry, buffer in sorted(places, key=lambda place: (place[0].file, place[0].start, place[0].nbytes)):
        if run:
            first, last = run[0][0], run[-1][0]
            follows = (last.file, last.start + last.nbytes) == (entry.file, entry.start)
            if not follows or entry.start + entry.nbytes - first.start > IN_ONE_CALL:
                yield run
                run = []
        run.append((entry, buffer))
    if run:
        yield run
