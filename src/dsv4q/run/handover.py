"""From the device to the writer, in order, while the next kernels run: encoded tensors, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from dsv4q.checkpoint.pipes import Behind
from dsv4q.checkpoint.writer import BackgroundWriter
from dsv4q.formats.dtypes import tensor_bytes
from dsv4q.run.linears import EncodedLinears, PlannedLinear, check_scales, unusable_scales

_PENDING = 4
"""Pieces of work that may wait; each holds the encoded form of some hundred million weights."""
_TOGETHER = 4
"""Linears whose tensors make one piece for the writer."""


class Handover(Behind):
    """A thread that waits for the device, so that the caller need not. On a CPU everything is done in the call.

    Nothing is done after a failure: a block of which a piece is missing must not be finished.
    """

    def __init__(self, writer: BackgroundWriter, device: torch.device) -> None:
        self._writer = writer
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        super().__init__(1 if self._stream is not None else 0, _PENDING)

    def linears(
        self,
        block: str,
        encoded: EncodedLinears,
        look: Callable[[Mapping[str, torch.Tensor], torch.Tensor], None],
    ) -> None:
        """Write the stored tensors of linears; `look` sees them and the sums on the host first.

        Raises (from a later call, or at the end of the context):
            CalibrationError: a scale that no consumer can use.
        """
        unusable, sums = self._to_host(unusable_scales(encoded.stored)), self._to_host(encoded.sums)
        host = {name: self._to_host(value) for name, value in encoded.stored.items()}
        done = self._stream.record_event() if self._stream is not None else None
        linears = encoded.linears

        def write() -> None:
            if done is not None:
                done.synchronize()
            if bool(unusable.any()):
                check_scales(linears, host)
            look(host, sums)
            # One view of the bytes of all linears: a tensor operation for each would hold up the caller's Python.
            whole = {name: tensor_bytes(value) for name, value in host.items()}
            for start in range(0, len(linears), _TOGETHER):
                some = enumerate(linears[start : start + _TOGETHER], start)
                self._writer.put(block, [piece for index, linear in some for piece in _pieces(linear, index, whole)])

        self.put(write)

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """By way of page-locked memory, which is several times as fast, on a stream beside the computation.

        What is on the host already stays there: `weight_shape` of packed integers.
        """
        if self._stream is None or not tensor.is_cuda:
            return tensor
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host


def _pieces(linear: PlannedLinear, index: int, whole: Mapping[str, memoryview]) -> Iterator[tuple[str, memoryview]]:
    """Names and bytes of the tensors of linear `index`, of the bytes of all by suffix."""
    for tensor in linear.planned:
        view = whole[tensor.name.removeprefix(f"{linear.spec.module}.")]
        yield tensor.name, view[index * tensor.nbytes : (index + 1) * tensor.nbytes]
