"""Whole shards on a thread of their own: held against the plan's header, judged, and deleted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch

from dsv4q.checkpoint.shards import PlannedShard
from dsv4q.errors import DeviceError
from dsv4q.verify.case import DEVICE_BYTES
from dsv4q.verify.judge import Judge

TOGETHER = 2
"""Shards that are being judged or wait for it; a further one has to wait before the run goes on."""


class _Stopped(Exception):
    """The run has ended with an error, and what is judged still does not matter any more."""


class Dropping:
    """What becomes of whole shards.

    Args:
        keep: leave the files where they are.

    An error of the judge, such as a disk that cannot be read, is raised by the next `submit` or by `wait`.
    """

    def __init__(self, judge: Judge, out: Path, *, keep: bool) -> None:
        self.judge, self.keep = judge, keep
        self.busy, self.waited = 0.0, 0.0
        """Seconds that judging took, and that the run waited for it."""
        self.peak = 0
        """Bytes of OUT on disk when a shard had become whole, at most."""
        self._out = out
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dsv4q-judge")
        self._pending: deque[Future[None]] = deque()
        self._stop = threading.Event()

    def submit(self, shard: PlannedShard) -> None:
        """Hand over a shard; waits while `TOGETHER` others are not done."""
        begin = time.perf_counter()
        self.peak = max(self.peak, self._on_disk())
        while len(self._pending) >= TOGETHER:
            self._pending.popleft().result()
        self.waited += time.perf_counter() - begin
        self._pending.append(self._pool.submit(self._judge_and_drop, shard.file, shard.header))

    def _judge_and_drop(self, file: str, header: bytes) -> None:
        begin = time.perf_counter()
        path = self._out / file
        try:
            self.judge.shard(file, header, self._check_stop)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                "The GPU ran out of memory while a shard was judged",
                where=path,
                expected=f"about {DEVICE_BYTES:,} bytes free beside the run",
                found=str(error).splitlines()[0],
                hint="free the GPU of other work, or lower calibration.micro_batch",
            ) from error
        if not self.keep:
            path.unlink()
        self.busy += time.perf_counter() - begin

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _on_disk(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self._out.rglob("*") if path.is_file())

    def wait(self, check_stop: Callable[[], None]) -> None:
        """Until everything that was handed over is judged; then what no shard had is told too."""
        while self._pending:
            check_stop()
            if wait([self._pending[0]], timeout=0.2).done:
                self._pending.popleft().result()
        self.judge.finish()

    def __enter__(self) -> Dropping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
