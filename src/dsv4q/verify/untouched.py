"""Tensors that an artifact stores as its source has them, held against the source byte by byte.

Memory: pieces of 16 MiB, but for what a native source has to dequantize, which is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from dsv4q.checkpoint.native import entries_of, is_dequantized
from dsv4q.errors import SourceError, WeightError
from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.verify.case import FLOATS, Case
from dsv4q.verify.files import Header
from dsv4q.verify.result import reason

PIECE = 16 << 20
Pieces = dict[int, bytes]
"""Of a tensor without a source: start of each piece -> SHA-256."""

_NAN = {"F8_E4M3": (0x7F, 0x7F), "F8_E8M0": (0xFF, 0xFF)}
"""Mask and the bits under it of what is no number."""


class UntouchedTensor:
    """One tensor; its byte ranges count together."""

    def __init__(self, case: Case, name: str, header: Header, twins: dict[str, Pieces]) -> None:
        self.case, self.name, self.header, self.twins = case, name, header, twins
        self.main = case.contract.copies.get(name, name)
        self.twin = None if case.source is None else case.source.tensors.get(self.main)
        self.lost = case.source is not None and case.is_lost(self.main)
        alike = self.twin is not None and (self.twin.dtype, self.twin.shape) == (header.dtype, header.shape)
        self.comparable = alike and not self.lost
        alone = case.source is None and case.deep
        self.is_twin = alone and name in {*case.contract.copies, *case.contract.copies.values()}
        self.pieces: Pieces = {}
        self.experts = case.contract.dims.experts if name.endswith(".tid2eid") else None
        self.different, self.first, self.bad = 0, 0, 0
        self.hash = hashlib.sha256()
        self.unread: SourceError | WeightError | None = None
        """Why the source could not be read to the end."""

    def checks(self) -> Iterator[ByteRange]:
        """Its bytes in order; an empty tensor has one range too."""
        source, whole = self.case.source, max(1, self.header.nbytes)
        step = whole if source is not None and is_dequantized(source, self.main) else PIECE
        for start in range(0, whole, step):
            yield ByteRange(self, start, min(step, self.header.nbytes - start), last=start + step >= whole)

    def count(self, start: int, unequal: int, first: int, bad: int) -> None:
        """Add what was found in a range that begins at byte `start` of the tensor."""
        if unequal and not self.different:
            self.first = start + first
        self.different += unequal
        self.bad += bad

    def finish(self) -> None:
        """Say what is wrong, now that every byte has been seen."""
        if self.case.hashed:
            self.case.digests[self.name] = self.hash.hexdigest()
        if self.unread is not None:
            self.case.differs("source", self.name, f"{self.main} of the source that can be read", reason(self.unread))
        elif self.case.source is not None and not self.lost:
            self._against_source()
        if self.is_twin and not self.bad:  # or one defect would be told twice
            self.twins[self.name] = self.pieces
            self._against_twin()
        if self.case.deep:
            self.case.log.looked_at("values")
            if self.bad:
                expected = "finite values" if self.experts is None else f"expert numbers below {self.experts}"
                self.case.differs("values", self.name, expected, f"{self.bad:,} others")

    def _against_twin(self) -> None:
        """Without a source, copies of the shared head are held against what they copy, when the later one comes."""
        for copy, main in self.case.contract.copies.items():
            if self.name in (copy, main) and {copy, main} <= self.twins.keys():
                self.case.log.looked_at("bytes")
                if self.twins[copy] != self.twins[main]:
                    self.case.differs("bytes", copy, f"the bytes of {main}, which it copies", "others")

    def _against_source(self) -> None:
        case, twin = self.case, self.twin
        case.log.looked_at("bytes")
        if twin is None:
            case.differs("source", self.name, f"{self.main} in the source", "no such tensor")
        elif not self.comparable:
            expected = f"{twin.dtype} {list(twin.shape)}, as in the source"
            case.differs("bytes", self.name, expected, self.header.text())
        elif self.different:
            found = f"{self.different:,} of {self.header.nbytes:,} bytes differ, the first at byte {self.first:,}"
            case.differs("bytes", self.name, f"the bytes of {twin.name} in the source", f"{found} of the tensor")


class ByteRange:
    """Some consecutive bytes of one tensor. All the work but hashing is done on the loading thread."""

    def __init__(self, tensor: UntouchedTensor, start: int, size: int, *, last: bool) -> None:
        self.tensor, self.start, self.size, self.last = tensor, start, size, last
        self.label = tensor.name
        self.read, self.memory = self._reads(), 2 * size
        self.unequal, self.first, self.bad = 0, 0, 0
        self.mine = bytearray()
        """Kept to be hashed, in the order of the ranges."""

    def _reads(self) -> int:
        source = self.tensor.case.source
        if source is None or not self.tensor.comparable:
            return self.size
        if is_dequantized(source, self.tensor.main):
            return self.size + sum(entry.nbytes for entry in entries_of(source, self.tensor.main))
        return 2 * self.size

    def load(self) -> None:
        tensor, case = self.tensor, self.tensor.case
        mine = bytearray(self.size)
        case.artifact.read_part(tensor.name, self.start, memoryview(mine))
        if tensor.comparable and case.source is not None:
            other = bytearray(self.size)
            try:
                case.source.read_part(tensor.main, self.start, memoryview(other))
            except (SourceError, WeightError) as error:
                tensor.unread, other = error, mine
            if mine != other:
                unequal = torch.frombuffer(mine, dtype=torch.uint8) != torch.frombuffer(other, dtype=torch.uint8)
                self.unequal, self.first = int(unequal.sum()), int(unequal.nonzero()[0])
        if tensor.is_twin:
            tensor.pieces[self.start] = hashlib.sha256(mine).digest()
        if case.hashed:
            self.mine = mine
        if case.deep and mine:
            self.bad = _impossible(mine, tensor.header.dtype, tensor.experts)

    def judge(self) -> None:
        if self.tensor.case.hashed:
            self.tensor.hash.update(self.mine)
            self.mine = bytearray()
        self.tensor.count(self.start, self.unequal, self.first, self.bad)
        if self.last:
            self.tensor.finish()


def _impossible(values: bytearray, dtype: str, experts: int | None) -> int:
    """How many values cannot be right: not finite, or, of a hash table, no expert's number."""
    if experts is not None:
        table = torch.frombuffer(values, dtype=torch.int64)
        return int(((table < 0) | (table >= experts)).sum())
    if dtype in _NAN:
        mask, nan = _NAN[dtype]
        return int((torch.frombuffer(values, dtype=torch.uint8) & mask == nan).sum())
    if dtype in FLOATS:
        return int((~torch.frombuffer(values, dtype=torch_dtypes()[dtype]).isfinite()).sum())
    return 0
