"""What becomes of whole shards that nobody keeps: judged behind the run as they come, if so wished, and deleted."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dsv4q.checkpoint.pipes import Behind
from dsv4q.checkpoint.shards import PlannedShard
from dsv4q.host import gpu_memory_errors, used_bytes

Judging = Callable[[str, bytes, Callable[[], None]], None]

TOGETHER = 2
"""Shards that are being judged or deleted, or wait for it; a further one has to wait before the run goes on."""


class Dropping(Behind):
    """Has whole shards judged, one after another, and deletes them, on a thread of its own.

    Without a judge each is deleted by the next free of two threads: one may not delete as fast as the disk takes them.

    Args:
        judge: called with a file in `out`, the header that it must have, and a function that raises once nobody wants
            the verdict any more; None: shards are only deleted.
        device_bytes: of a GPU, that judging takes.
        keep: leave the files where they are.

    An error of the judge, such as a disk that cannot be read, is raised by the next `submit` or by `drain`.
    """

    def __init__(self, judge: Judging | None, out: Path, device_bytes: int, *, keep: bool) -> None:
        super().__init__(TOGETHER if judge is None else 1, TOGETHER)
        self.keep = keep
        self.waited = 0.0
        """Seconds that the run waited for judging and deleting."""
        self.peak = 0
        """Bytes of OUT on disk when a shard had become whole, at most."""
        self._judge, self._out, self._device_bytes = judge, out, device_bytes
        self._seconds: list[float] = []

    @property
    def busy(self) -> float:
        """Seconds that judging and deleting took, all shards added up."""
        return sum(self._seconds)

    def submit(self, shard: PlannedShard) -> None:
        """Hand over a shard; waits while `TOGETHER` others are not done."""
        begin = time.perf_counter()
        self.peak = max(self.peak, used_bytes(self._out))
        self.put(partial(self._judge_and_drop, shard.file, shard.header))
        self.waited += time.perf_counter() - begin

    def _judge_and_drop(self, file: str, header: bytes) -> None:
        begin = time.perf_counter()
        path = self._out / file
        room = f"about {self._device_bytes:,} bytes free beside the run"
        less = "free the GPU of other work, or lower calibration.micro_batch"
        with gpu_memory_errors(path, while_=" while a shard was judged", expected=room, hint=less):
            if self._judge is not None:
                self._judge(file, header, self.check)
        if not self.keep:
            path.unlink()
        self._seconds.append(time.perf_counter() - begin)
