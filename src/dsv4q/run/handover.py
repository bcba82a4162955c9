"""From the device to the writer, in order, while the next kernels run: encoded tensors, and what is known of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

from dsv4q.checkpoint.writer import BackgroundWriter
from dsv4q.formats.dtypes import tensor_bytes
from dsv4q.run.modules import Member, State

_PENDING = 4
"""Pieces of work that may wait; each holds the encoded form of some hundred million weights."""
_TOGETHER = 4
"""Linears whose tensors make one piece for the writer."""


class Handover:
    """A thread that waits for the device, so that the caller need not. On a CPU everything is done in the call.

    An error in the thread is raised by the next call, or at the end of the context.
    """

    def __init__(self, writer: BackgroundWriter, device: torch.device) -> None:
        self._writer = writer
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dsv4q-hand")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def tensors(
        self, block: str, members: Sequence[Member], stored: State, look: Callable[[Mapping[str, torch.Tensor]], None]
    ) -> None:
        """Write the stored tensors [T, ...] of T members; `look` sees them on the host first and may raise."""
        host = {name: self._to_host(value) for name, value in stored.items()}
        done = self._stream.record_event() if self._stream is not None else None

        def write() -> None:
            if done is not None:
                done.synchronize()
            look(host)
            # One view of the bytes of all members: a tensor operation for each would hold up the caller's Python.
            whole = {name: tensor_bytes(value) for name, value in host.items()}
            for start in range(0, len(members), _TOGETHER):
                some = enumerate(members[start : start + _TOGETHER], start)
                self._writer.put(block, [piece for index, member in some for piece in _pieces(member, index, whole)])

        self.then(write)

    def then(self, work: Callable[[], None]) -> None:
        """Do something after all that was handed over before."""
        if self._stream is None:
            return work()
        while self._pending and (len(self._pending) >= _PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._unless_failed, work))

    def _unless_failed(self, work: Callable[[], None]) -> None:
        """Nothing is done after a failure: a block of which a piece is missing must not be finished."""
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor to the host; the function that it gives waits for it, in whatever thread."""
        host = self._to_host(tensor)
        done = self._stream.record_event() if self._stream is not None else None

        def wait() -> torch.Tensor:
            if done is not None:
                done.synchronize()
            return host

        return wait

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """By way of page-locked memory, which is several times as fast, on a stream beside the computation."""
        if self._stream is None:
            return tensor
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._aside():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host

    def _aside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def __enter__(self) -> Handover:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            for future in self._pending:
                future.result()


def _pieces(member: Member, index: int, whole: Mapping[str, memoryview]) -> Iterator[tuple[str, memoryview]]:
    """Names and bytes of the tensors of member `index`, of the bytes of all by suffix."""
    for tensor in member.planned:
        view = whole[tensor.name.removeprefix(f"{member.spec.module}.")]
        yield tensor.name, view[index * tensor.nbytes : (index + 1) * tensor.nbytes]
