"""Reading ahead: the next tensors come from the disk while these are worked on.

Several threads read whole tensors in the order in which the run takes them, never more than a budget of bytes ahead.
For a GPU they read into pinned memory, from which copies run at full speed and beside computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from dsv4q.checkpoint.layout import TensorSpec
from dsv4q.checkpoint.source import Checkpoint

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


class Reader:
    """Tensors of `specs`, in this order, each read once.

    Args:
        budget: bytes that may be read and not yet taken; one tensor is always allowed.
        threads: reads under way at once.
        pin: read into page-locked memory.
    """

    def __init__(
        self, source: Checkpoint, specs: Iterable[TensorSpec], *, budget: int, threads: int, pin: bool
    ) -> None:
        self._source = source
        self._waiting: Iterator[TensorSpec] = iter(specs)
        self._next = next(self._waiting, None)
        self._reading: deque[tuple[TensorSpec, Future[torch.Tensor]]] = deque()
        self._ahead = 0
        self._budget = budget
        self._pin = pin
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dsv4q-read")

    def take(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor of `spec`, which must be the next one in order.

        Raises:
            SourceError: the file could not be read.
        """
        self._fill()
        expected, future = self._reading.popleft()
        assert expected.name == spec.name, f"{spec.name} asked for, {expected.name} is next"
        tensor = future.result()
        self._ahead -= spec.nbytes
        self._fill()
        return tensor

    def _fill(self) -> None:
        while self._next is not None and (not self._reading or self._ahead + self._next.nbytes <= self._budget):
            self._ahead += self._next.nbytes
            self._reading.append((self._next, self._pool.submit(self._read, self._next)))
            self._next = next(self._waiting, None)

    def _read(self, spec: TensorSpec) -> torch.Tensor:
        if not self._pin:
            return self._source.tensor(spec.name)
        tensor = torch.empty(spec.shape, dtype=_DTYPES[spec.dtype], pin_memory=True)
        self._source.read_into(spec.name, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
