"""The residual streams of all micro-batches between two blocks: on the GPU, on the host, or on disk.

Where they live depends on their size and on the GPU's. Every few blocks they are saved to disk, so that a resume need
not compute all blocks again; where they live on disk, they are saved as they are written.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dsv4q.checkpoint.files import disk_errors, fsync, fsync_folder, write_at
from dsv4q.checkpoint.pipes import Behind, loaded_ahead
from dsv4q.formats.dtypes import tensor_bytes
from dsv4q.plan.needs import STREAMS_IN_MEMORY

SAVE_BYTES_PER_SECOND = 1e9
"""What saving is taken to cost."""
WORK_PER_SAVE = 60
"""Streams are saved once the work since they were saved last is so many times what saving costs."""

Shape = tuple[int, ...]


@dataclass
class ResidualStreams:
    """BF16 [B, S, C, D] for each micro-batch.

    Args:
        folder: where they are saved.
        shapes: of each micro-batch.
        mine: numbers of the micro-batches that this rank has.
        on_gpu: they stay on the device, a GPU, between two blocks.
    """

    folder: Path
    device: torch.device
    shapes: Sequence[Shape]
    mine: Sequence[int]
    on_gpu: bool = False
    block: str | None = None
    """The block whose output they are."""
    _held: dict[int, torch.Tensor] = field(default_factory=dict)
    _beside: torch.cuda.Stream | None = None
    """Where they are kept on the host: what copies them there and back."""
    _saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and not self.on_gpu and not self.spilled:
            self._beside = torch.cuda.Stream(self.device)

    @property
    def nbytes(self) -> int:
        return sum(2 * math.prod(shape) for shape in self.shapes)

    @property
    def spilled(self) -> bool:
        """Whether they live on disk."""
        return not self.on_gpu and self.nbytes > STREAMS_IN_MEMORY

    def __len__(self) -> int:
        return len(self.mine)

    # ------------------------------------------------------------------------------------------ block after block

    def through(self, block: str, compute: Callable[[int, torch.Tensor | None], torch.Tensor]) -> None:
        """Replace each micro-batch's streams by what `compute` makes of its number and them, None before `embed`.

        They are then the output of `block`.
        """
        if self.spilled:
            self._through_disk(block, compute)
        elif self._beside is not None:
            self._held = self._through_host(self._beside, compute)
        else:
            self._held = {number: compute(number, self._held.get(number)) for number in self.mine}
        self.block = block

    # ------------------------------------------------------------------------------------------------- on the host

    def _through_host(
        self, beside: torch.cuda.Stream, compute: Callable[[int, torch.Tensor | None], torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """As `through`, from the host and back: one micro-batch comes ahead and one leaves while another is computed.

        Returns:
            The new streams in page-locked memory, some of them still on their way on `beside`.
        """
        main = torch.cuda.current_stream(self.device)
        places: list[torch.Tensor] = []
        if self._held:
            largest = max(held.numel() for held in self._held.values())
            places = [torch.empty(largest, dtype=torch.bfloat16, device=self.device) for _ in range(2)]
            beside.wait_stream(main)  # what had that memory before may still be at work

        def fetch(turn: int) -> tuple[torch.Tensor, torch.cuda.Event] | None:
            if turn >= len(self.mine) or not self._held:
                return None
            held = self._held[self.mine[turn]]
            with torch.cuda.stream(beside):
                there = places[turn % 2][: held.numel()].view(held.shape).copy_(held, non_blocking=True)
            return there, beside.record_event()

        made = {}
        coming = fetch(0)
        for turn, number in enumerate(self.mine):
            before = coming[0] if coming is not None else None
            if coming is not None:
                main.wait_event(coming[1])
            coming = fetch(turn + 1)
            out = compute(number, before)
            beside.wait_stream(main)
            with torch.cuda.stream(beside):
                made[number] = torch.empty(out.shape, dtype=out.dtype, pin_memory=True).copy_(out, non_blocking=True)
            out.record_stream(beside)
        return made

    # ---------------------------------------------------------------------------------------------------- on disk

    def _through_disk(self, block: str, compute: Callable[[int, torch.Tensor | None], torch.Tensor]) -> None:
        """As `through`: one micro-batch is read ahead and one written behind."""
        path = self._file(block)
        with (
            _opened(path, write=True) as out,
            self._stored() as stored,
            loaded_ahead(self.mine, stored, lambda _: 1, budget=2, threads=1) as before,
            Behind(1, 2) as behind,
        ):
            for number, streams in before:
                made = compute(number, None if streams is None else streams.to(self.device))
                behind.put(partial(self._write, out, number, made, path))
                del streams, made

    @contextmanager
    def _stored(self) -> Iterator[Callable[[int], torch.Tensor | None]]:
        """How to read the streams of one micro-batch before the next block; nothing is there before `embed`."""
        if self.block is None:
            yield lambda _: None
            return
        path = self._file(self.block)
        with _opened(path) as file:
            yield lambda number: self._read(file, number, path)

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

    def _file(self, block: str) -> Path:
        return self.folder / f"streams.{block}"

    # ----------------------------------------------------------------------------------------------------- saving

    @property
    def should_be_saved(self) -> bool:
        """Whether enough work was done since they were saved last; always where they live on disk anyway."""
        cost = self.nbytes / SAVE_BYTES_PER_SECOND
        return self.spilled or time.monotonic() - self._saved_at >= WORK_PER_SAVE * cost

    def to_save(self) -> Callable[[], None]:
        """What makes this rank's streams durable, for another thread to call.

        A file counts once the journal has the block, so it is to be called before the block's line is written.
        """
        self._saved_at = time.monotonic()
        assert self.block is not None
        held, block = self._held, self.block
        made_by = [] if self.device.type != "cuda" else [torch.cuda.current_stream(self.device)]
        done = [stream.record_event() for stream in (*made_by, self._beside) if stream is not None]

        def save() -> None:
            for event in done:
                event.synchronize()
            self._save(block, held)

        return save

    def _save(self, block: str, held: Mapping[int, torch.Tensor]) -> None:
        path = self._file(block)
        with _opened(path, write=True) as file, disk_errors("Saving the residual streams failed", path):
            for number, streams in held.items():
                self._write(file, number, streams, path)
            fsync(file)
        fsync_folder(self.folder)

    def drop_before(self, block: str, blocks: Sequence[str]) -> None:
        """Delete what was saved of the blocks before this one in `blocks`, if this one's are saved."""
        if self._file(block).is_file():
            for earlier in blocks[: blocks.index(block)]:
                self._file(earlier).unlink(missing_ok=True)

    def forget_but(self, blocks: Sequence[str]) -> None:
        """Delete what an earlier process left of blocks that it did not finish."""
        keep = {self._file(block) for block in blocks}
        for path in self.folder.glob("streams.*"):
            if path not in keep:
                path.unlink()

    def restore(self, blocks: Sequence[str]) -> str | None:
        """Take up the newest saved streams among the outputs of finished `blocks`; returns whose they are."""
        for block in reversed(blocks):
            path = self._file(block)
            if path.is_file() and path.stat().st_size == self.nbytes:
                if not self.spilled:
                    home = self.device if self._beside is None else torch.device("cpu")
                    with _opened(path) as file:
                        self._held = {n: self._read(file, n, path).to(home) for n in self.mine}
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
