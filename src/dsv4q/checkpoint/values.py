"""Tensors of a source as their bytes are written: decoded on a GPU, or on a CPU by threads that have a core each.

What is quantized in the native way travels to a GPU as it lies in the files, is decoded there, several tensors that are
stored alike at once, and comes back to page-locked memory. On a CPU each thread decodes tensors of its own with one
thread for each operation: operations on several threads would wait for each other after every step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from dsv4q.checkpoint.alike import stored_alike, stored_kind
from dsv4q.checkpoint.native import is_dequantized
from dsv4q.checkpoint.pipes import BUDGET, THREADS, loaded_ahead
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.host import compute_alone, cores

TOGETHER = {"cpu": 16 << 20, "cuda": 64 << 20}
"""Bytes of the tensors that are read and decoded together; one tensor is always allowed."""
_GPU_THREADS = 8
"""One thread copies 2.5 GB/s out of the page cache, and waits while the device decodes."""


@dataclass(frozen=True)
class Batch:
    """Tensors that are stored alike."""

    names: tuple[str, ...]
    nbytes: int
    """Of all their values."""


def batches(source: Checkpoint, names: Iterable[str], device: torch.device) -> list[Batch]:
    """Those that are stored alike together, as far as `TOGETHER` allows."""
    alike = stored_alike(
        names, partial(stored_kind, source), lambda name: source.tensors[name].nbytes, TOGETHER[device.type]
    )
    return [Batch(*one) for one in alike]


@contextmanager
def values_ahead(
    source: Checkpoint, wanted: Sequence[Batch], device: torch.device
) -> Iterator[Iterator[tuple[Batch, torch.Tensor]]]:
    """Each batch with its values [T, ...] on the host, in order; read and decoded ahead, at most `BUDGET` bytes.

    Raises (from the iterator):
        SourceError, WeightError: as `Checkpoint.tensor`.
    """
    on_gpu = device.type == "cuda"
    with loaded_ahead(
        wanted,
        _Decoder(source, device),
        lambda batch: batch.nbytes,
        budget=BUDGET,
        threads=_GPU_THREADS if on_gpu else max(THREADS, cores()),
        **({} if on_gpu else {"begin": compute_alone}),
    ) as ready:
        yield ready


class _Decoder:
    """Reads and decodes; each thread that calls it has a stream of the device of its own."""

    def __init__(self, source: Checkpoint, device: torch.device) -> None:
        self._source, self._device = source, device
        self._streams = threading.local()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The values of a batch [T, ...] on the host."""
        on_gpu = self._device.type == "cuda" and is_dequantized(self._source, batch.names[0])
        stored = self._source.stored_together(batch.names, pinned=on_gpu)
        if not on_gpu:
            return self._source.decoded_together(batch.names, stored)
        with torch.cuda.stream(self._stream()):
            there = [part.to(self._device, non_blocking=True) for part in stored]
            values = self._source.decoded_together(batch.names, there)
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
        self._stream().synchronize()
        return host

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = self._streams.own
        return stream
