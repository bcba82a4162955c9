"""Tensors that an artifact stores as its source has them, held against the source byte by byte.

Memory: pieces of 16 MiB, but for what a native source has to dequantize, which is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import is_dequantized
from dsv4q.errors import SourceError
from dsv4q.verify.case import FLOATS, Case
from dsv4q.verify.files import Header

PIECE = 16 << 20


class Untouched:
    """One tensor; its pieces count together."""

    def __init__(self, case: Case, name: str, header: Header) -> None:
        self.case, self.name, self.header = case, name, header
        self.main = case.survey.copies.get(name, name)
        self.twin = None if case.source is None else case.source.tensors.get(self.main)
        self.comparable = self.twin is not None and (self.twin.dtype, self.twin.shape) == (header.dtype, header.shape)
        self.experts = case.survey.dims.experts if name.endswith(".tid2eid") else None
        self.different, self.first, self.bad = 0, 0, 0

    def jobs(self) -> Iterator[Piece]:
        """Its pieces in order; an empty tensor has one too."""
        source, whole = self.case.source, max(1, self.header.nbytes)
        step = whole if source is not None and is_dequantized(source, self.main) else PIECE
        for start in range(0, whole, step):
            yield Piece(self, start, min(step, self.header.nbytes - start), last=start + step >= whole)

    def count(self, start: int, unequal: int, first: int, bad: int) -> None:
        """Add what one piece, which begins at byte `start` of the tensor, found."""
        if unequal and not self.different:
            self.first = start + first
        self.different += unequal
        self.bad += bad

    def finish(self) -> None:
        """Say what is wrong, now that every piece has been seen."""
        case, twin = self.case, self.twin
        if case.source is not None:
            case.log.looked_at("bytes")
            if twin is None:
                case.differs("source", self.name, f"{self.main} in the source", "no such tensor")
            elif not self.comparable:
                expected = f"{twin.dtype} {list(twin.shape)}, as in the source"
                case.differs("bytes", self.name, expected, self.header.text())
            elif self.different:
                found = f"{self.different:,} of {self.header.nbytes:,} bytes differ, the first at byte {self.first:,}"
                case.differs("bytes", self.name, f"the bytes of {twin.name} in the source", f"{found} of the tensor")
        if case.deep:
            case.log.looked_at("values")
            if self.bad:
                expected = "finite values" if self.experts is None else f"expert numbers below {self.experts}"
                case.differs("values", self.name, expected, f"{self.bad:,} others")


class Piece:
    """Some consecutive bytes of one tensor. All the work is done on the loading thread."""

    def __init__(self, tensor: Untouched, start: int, size: int, *, last: bool) -> None:
        self.tensor, self.start, self.size, self.last = tensor, start, size, last
        self.label = tensor.name
        self.memory = 2 * size
        self.unequal, self.first, self.bad = 0, 0, 0

    def load(self) -> None:
        tensor, case = self.tensor, self.tensor.case
        header = tensor.header
        mine = _read(case.survey.root / header.file, header.start + self.start, self.size, tensor.name)
        if tensor.comparable:
            other = self._source_bytes()
            if mine != other:
                unequal = torch.frombuffer(mine, dtype=torch.uint8) != torch.frombuffer(other, dtype=torch.uint8)
                self.unequal, self.first = int(unequal.sum()), int(unequal.nonzero()[0])
        if case.deep and mine:
            self.bad = _impossible(mine, header.dtype, tensor.experts)

    def judge(self) -> None:
        self.tensor.count(self.start, self.unequal, self.first, self.bad)
        if self.last:
            self.tensor.finish()

    def _source_bytes(self) -> memoryview | bytearray:
        source, twin = self.tensor.case.source, self.tensor.twin
        assert source is not None and isinstance(twin, TensorEntry)
        if is_dequantized(source, twin.name):
            return source.read(twin.name)
        return _read(source.root / twin.file, twin.start + self.start, self.size, twin.name)


def _impossible(piece: bytearray, dtype: str, experts: int | None) -> int:
    """How many values cannot be right: not finite, or, of a hash table, no expert's number."""
    if experts is not None:
        table = torch.frombuffer(piece, dtype=torch.int64)
        return int(((table < 0) | (table >= experts)).sum())
    if dtype in FLOATS:
        return int((~torch.frombuffer(piece, dtype=FLOATS[dtype]).isfinite()).sum())
    return 0


def _read(path: Path, start: int, size: int, name: str) -> bytearray:
    piece = bytearray(size)
    view, filled = memoryview(piece), 0
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while filled < size:
                count = stream.readinto(view[filled:])
                if not count:
                    raise SourceError("A shard ended while it was read", where=f"{path}: {name}")
                filled += count
    except OSError as error:
        raise SourceError(
            "Reading a shard failed", where=f"{path}: {name}", found=error, hint="check the disk"
        ) from error
    return piece
