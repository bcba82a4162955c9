"""The residual streams of all micro-batches between two blocks: on the GPU, on the host, or on disk.

Where they live depends on their size alone. Every few blocks they are saved to disk, so that a resume need not compute
all blocks again; where they live on disk, they are saved as they are written.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsv4q.calibration.measure import tensor_bytes
from dsv4q.checkpoint.journal import fsync_folder
from dsv4q.checkpoint.plan import STREAMS_IN_MEMORY, STREAMS_ON_GPU
from dsv4q.checkpoint.writer import disk_errors, write_at

SAVE_BYTES_PER_SECOND = 1e9
"""What saving is taken to cost."""
WORK_PER_SAVE = 20
"""Streams are saved once the work since they were saved last is so many times what saving costs."""

Shape = tuple[int, ...]


@dataclass
class ResidualStreams:
    """BF16 [B, S, C, D] for each micro-batch.

    Args:
        folder: where they are saved.
        shapes: of each micro-batch.
    """

    folder: Path
    device: torch.device
    shapes: Sequence[Shape]
    block: str | None = None
    """The block whose output they are."""
    _held: list[torch.Tensor] = field(default_factory=list)
    _next: list[torch.Tensor] = field(default_factory=list)
    _saved_at: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        return sum(2 * math.prod(shape) for shape in self.shapes)

    @property
    def spilled(self) -> bool:
        """Whether they live on disk."""
        return self.nbytes > STREAMS_IN_MEMORY

    def __len__(self) -> int:
        return len(self.shapes)

    # ------------------------------------------------------------------------------------------ block after block

    def through(self, block: str, compute: Callable[[int, torch.Tensor | None], torch.Tensor]) -> None:
        """Replace each micro-batch's streams by what `compute` makes of its number and them, None before `embed`.

        They are then the output of `block`.
        """
        if self.spilled:
            self._through_disk(block, compute)
        else:
            self._next = []
            for number in range(len(self)):
                before = self._held[number].to(self.device, non_blocking=True) if self.block else None
                self._next.append(self._keep(compute(number, before)))
            self._held, self._next = self._next, []
        self.block = block

    def _keep(self, streams: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda" or self.nbytes <= STREAMS_ON_GPU:
            return streams
        host = torch.empty(streams.shape, dtype=streams.dtype, pin_memory=True)
        return host.copy_(streams, non_blocking=True)

    # ---------------------------------------------------------------------------------------------------- on disk

    def _through_disk(self, block: str, compute: Callable[[int, torch.Tensor | None], torch.Tensor]) -> None:
        """As `through`: one micro-batch is read ahead and one written behind."""
        partial = self._file(block, partial=True)
        with ThreadPoolExecutor(2, thread_name_prefix="dsv4q-spill") as pool, _opened(partial, write=True) as out:
            before = None if self.block is None else self._file(self.block)
            written: list[Future[None]] = []
            for number, streams in enumerate(self._read_ahead(before, pool)):
                made = compute(number, None if streams is None else streams.to(self.device))
                while len(written) > 1:
                    written.pop(0).result()
                written.append(pool.submit(self._write, out, number, made, partial))
                del streams, made
            for future in written:
                future.result()
        # Not durable yet, and not believed before the journal knows the block.
        os.replace(partial, self._file(block))

    def _read_ahead(self, path: Path | None, pool: ThreadPoolExecutor) -> Iterator[torch.Tensor | None]:
        if path is None:
            yield from (None for _ in range(len(self)))
            return
        with _opened(path) as file:
            waiting = pool.submit(self._read, file, 0, path)
            for number in range(len(self)):
                streams = waiting.result()
                if number + 1 < len(self):
                    waiting = pool.submit(self._read, file, number + 1, path)
                yield streams

    def _read(self, file: int, number: int, path: Path) -> torch.Tensor:
        tensor = torch.empty(self.shapes[number], dtype=torch.bfloat16, pin_memory=self.device.type == "cuda")
        view = tensor_bytes(tensor)
        offset = self._offset(number)
        with disk_errors("Reading the residual streams failed", path):
            while view:
                count = os.preadv(file, [view], offset)
                if not count:
                    raise OSError(0, "the file ends early")
                view, offset = view[count:], offset + count
        return tensor

    def _write(self, file: int, number: int, streams: torch.Tensor, path: Path) -> None:
        with disk_errors("Saving the residual streams failed", path):
            write_at(file, [tensor_bytes(streams)], self._offset(number))

    def _offset(self, number: int) -> int:
        return sum(2 * math.prod(shape) for shape in self.shapes[:number])

    def _file(self, block: str, *, partial: bool = False) -> Path:
        return self.folder / f"streams.{block}{'.partial' if partial else ''}"

    # ----------------------------------------------------------------------------------------------------- saving

    def to_save(self) -> Callable[[], None] | None:
        """What makes the streams durable, for another thread to call; None while they need not be.

        The newest saved ones are kept, so it is to be called before the journal's line of the block is written.
        """
        cost = self.nbytes / SAVE_BYTES_PER_SECOND
        if not self.spilled and time.monotonic() - self._saved_at < WORK_PER_SAVE * cost:
            return None
        self._saved_at = time.monotonic()
        assert self.block is not None
        held, block = list(self._held), self.block
        done = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

        def save() -> None:
            if done is not None:
                done.synchronize()
            self._save(block, held)

        return save

    def _save(self, block: str, held: Sequence[torch.Tensor]) -> None:
        path = self._file(block)
        partial = path if self.spilled else self._file(block, partial=True)
        with _opened(partial, write=True) as file, disk_errors("Saving the residual streams failed", partial):
            for number, streams in enumerate(held):
                self._write(file, number, streams, partial)
            os.fsync(file)
        os.replace(partial, path)
        fsync_folder(self.folder)

    def drop_before(self, block: str, blocks: Sequence[str]) -> None:
        """Delete what was saved of the blocks before this one in `blocks`, if this one's are saved."""
        if self._file(block).is_file():
            for earlier in blocks[: blocks.index(block)]:
                self._file(earlier).unlink(missing_ok=True)

    def restore(self, blocks: Sequence[str]) -> str | None:
        """Take up the newest saved streams among the outputs of finished `blocks`; returns whose they are."""
        for block in reversed(blocks):
            path = self._file(block)
            if path.is_file() and path.stat().st_size == self.nbytes:
                if not self.spilled:
                    with _opened(path) as file:
                        self._held = [self._keep(self._read(file, n, path).to(self.device)) for n in range(len(self))]
                self.block = block
                return block
        return None


class _opened:
    """A file descriptor for a `with`, with errors that name the file."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        with disk_errors("The residual streams cannot be opened", path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT if write else os.O_RDONLY, 0o644)

    def __enter__(self) -> int:
        return self._handle

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)
