"""Two artifacts or checkpoints, tensor by tensor: headers -> pairs -> bytes -> values where bytes differ -> result.

Bytes are read and compared on threads, ahead of the values; what is equal is let go at once and never decoded.
Memory: `pipes.BUDGET` bytes of both sides, or the largest quantized weight of both, besides what `ROWS_AT_ONCE` values
need. Tensors that both store as they are go in pieces, however large they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4q import __version__
from dsv4q.checkpoint.files import AGAIN, fill, opened
from dsv4q.checkpoint.headers import TensorEntry, shown
from dsv4q.checkpoint.pipes import BUDGET, loaded_ahead
from dsv4q.checkpoint.source import Checkpoint, open_checkpoint
from dsv4q.console import Console
from dsv4q.errors import SourceError
from dsv4q.foreign.layouts import Logical, Names, logical_tensors
from dsv4q.foreign.result import EQUAL_BYTES, TensorPair, by_class, transitions
from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.formats.stored import StoredRows
from dsv4q.host import gpu_memory_errors, stoppable, usable_device
from dsv4q.layout import DTYPE_BYTES

FORMAT = 1
"""Version of the result's structure."""
PIECE = 1 << 24
"""Values of a tensor, stored as it is by both, that are read and compared at once."""
ROWS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Values that are decoded at once, if a block of scales is not more than that."""
_GPU_BUDGET, _GPU_THREADS = 4 << 30, 8


@dataclass(frozen=True)
class DiffRequest:
    """One comparison as the user asked for it. Errors are those of B against A."""

    a: Path
    b: Path
    device: str = "auto"


def diff(request: DiffRequest, console: Console) -> dict[str, Any]:
    """Compare; returns the result as plain JSON values. `same` is True if every tensor is the same bytes.

    Raises:
        SourceError: a checkpoint that is absent, damaged or has no weights; reading fails.
        DeviceError: no such device, or it has too little memory.
    """
    begin = time.monotonic()
    device = usable_device(request.device)
    with _opened(request.a) as first, _opened(request.b) as second:
        names = Names(first.config, second.config)
        a, b = logical_tensors(first, names), logical_tensors(second, names)
        pairs = [TensorPair(name, names.class_of(name), one, b[name]) for name, one in a.items() if name in b]
        with gpu_memory_errors(f"--device {device}"):
            _compare(first, second, pairs, device, console)
    only_a, only_b = [name for name in a if name not in b], [name for name in b if name not in a]
    lone = {side: [names.class_of(name) for name in only] for side, only in (("a", only_a), ("b", only_b))}
    return {
        "format": FORMAT,
        "same": not (only_a or only_b) and all(pair.verdict == EQUAL_BYTES for pair in pairs),
        "a": _side(request.a, first, a),
        "b": _side(request.b, second, b),
        "classes": by_class(pairs, lone),
        "stored_as": transitions(pairs),
        "only_a": only_a,
        "only_b": only_b,
        "tensors": [pair.as_dict() for pair in pairs if pair.verdict != EQUAL_BYTES],
        "device": str(device),
        "seconds": round(time.monotonic() - begin, 3),
        "versions": {"dsv4q": __version__, "torch": torch.__version__},
    }


def _opened(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    if not checkpoint.has_weights:
        raise SourceError("There are no safetensors files here", where=path, hint="give a checkpoint folder")
    return checkpoint


def _side(path: Path, checkpoint: Checkpoint, logical: Mapping[str, Logical]) -> dict[str, Any]:
    size = sum(entry.nbytes for entry in checkpoint.tensors.values())
    return {"path": str(path), "tensors": len(checkpoint.tensors), "logical": len(logical), "bytes": size}


# ------------------------------------------------------------------------------------------------ bytes

Parts = dict[str, Tensor]
"""Suffix -> stored tensor."""


@dataclass(frozen=True, eq=False)
class _PairSpan:
    """A pair; or, of one that both store as it is, the values begin … end."""

    pair: TensorPair
    first: Checkpoint
    second: Checkpoint
    span: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Of both sides, in memory."""
        if self.span is None:
            return self.pair.a.nbytes + self.pair.b.nbytes
        width = sum(DTYPE_BYTES[_only(side)[1].dtype] for side in (self.pair.a, self.pair.b))
        return (self.span[1] - self.span[0]) * width

    def load(self) -> tuple[Parts, Parts] | None:
        """What both store; None if it is the same bytes. Runs on any thread."""
        a, b = self._read(self.first, self.pair.a), self._read(self.second, self.pair.b)
        same = self.pair.same_storage and all(_same_bytes(a[suffix], b[suffix]) for suffix in a)
        return None if same else (a, b)

    def _read(self, checkpoint: Checkpoint, logical: Logical) -> Parts:
        if self.span is None:
            return {suffix: checkpoint.tensor(entry.name) for suffix, entry in logical.parts.items()}
        suffix, entry = _only(logical)
        return {suffix: _piece(checkpoint, entry, *self.span)}


def _only(logical: Logical) -> tuple[str, TensorEntry]:
    return next(iter(logical.parts.items()))


def _piece(checkpoint: Checkpoint, entry: TensorEntry, begin: int, end: int) -> Tensor:
    """The values begin … end of a tensor, flat."""
    size, path = DTYPE_BYTES[entry.dtype], checkpoint.root / entry.file
    raw = torch.empty((end - begin) * size, dtype=torch.uint8)
    with opened(path) as (handle, _):
        count = fill(handle, [raw.numpy().data], entry.start + begin * size, path)
    if count != raw.numel():
        where, found = f"{path}: {shown(entry.name)}", f"{count:,} of {raw.numel():,} bytes"
        raise SourceError("A shard ended while it was read", where=where, found=found, hint=AGAIN)
    return raw.view(torch_dtypes()[entry.dtype])


def _same_bytes(mine: Tensor, yours: Tensor) -> bool:
    # As integers -0 differs from 0 and a NaN equals itself; torch compares wide ones five times as fast.
    raw = [tensor.reshape(-1).view(torch.uint8) for tensor in (mine, yours)]
    wide = raw[0].numel() // 8 * 8
    heads = [tensor[:wide].view(torch.int64) for tensor in raw]
    return torch.equal(*heads) and torch.equal(raw[0][wide:], raw[1][wide:])


def _compare(
    first: Checkpoint, second: Checkpoint, pairs: list[TensorPair], device: torch.device, console: Console
) -> None:
    work = [piece for pair in pairs for piece in _pieces(pair, first, second)]
    on_gpu = device.type == "cuda"
    with (
        stoppable() as check_stop,
        loaded_ahead(
            work,
            _PairSpan.load,
            lambda piece: piece.nbytes,
            budget=_GPU_BUDGET if on_gpu else BUDGET,
            threads=_GPU_THREADS if on_gpu else 4,
        ) as loaded,
        console.progress("comparing", sum(piece.nbytes for piece in work)) as progress,
    ):
        for piece, parts in loaded:
            check_stop()
            progress.describe(piece.pair.name)
            if parts is not None:
                piece.pair.bytes_equal = False
                if piece.pair.is_decoded:
                    _compare_values(piece.pair, *parts, device)
            progress.advance(piece.nbytes)


def _pieces(pair: TensorPair, first: Checkpoint, second: Checkpoint) -> Iterator[_PairSpan]:
    """What there is to read of a pair: nothing where neither bytes nor values could be equal."""
    if pair.same_shape and all(side.encoding is None and not side.unknown for side in (pair.a, pair.b)):
        count = math.prod(pair.a.shape)
        for begin in range(0, count, PIECE):
            yield _PairSpan(pair, first, second, (begin, min(begin + PIECE, count)))
    elif pair.same_storage or (pair.same_shape and pair.is_decoded):
        yield _PairSpan(pair, first, second)


# ------------------------------------------------------------------------------------------------ values


@torch.no_grad()
def _compare_values(pair: TensorPair, a: Parts, b: Parts, device: torch.device) -> None:
    # A multiplier that was made of a divisor is its reciprocal in F32; two divisors differ wherever they do.
    kind = torch.float32 if pair.a.reciprocal != pair.b.reciprocal else torch.float64
    mine, yours = _SideValues(pair.a, a, device, kind), _SideValues(pair.b, b, device, kind)
    step = math.lcm(mine.step, yours.step)
    at_once = max(1, ROWS_AT_ONCE[device.type] // max(mine.columns, 1) // step) * step
    for begin in range(0, mine.rows, at_once):
        end = min(begin + at_once, mine.rows)
        pair.comparison.add(mine.read(begin, end), yours.read(begin, end))


class _SideValues:
    """One side of what is compared as numbers, some rows at a time.

    Args:
        kind: in which reciprocals are computed.
    """

    def __init__(self, logical: Logical, parts: Parts, device: torch.device, kind: torch.dtype) -> None:
        there = {suffix: tensor.to(device) for suffix, tensor in parts.items()}
        self._coded = None if logical.encoding is None else StoredRows(logical.encoding, there, logical.shape)
        self._reciprocal = kind if logical.reciprocal else None
        plain = next(iter(there.values()))
        # Whole, it has the rows and columns of the quantized other side; else it is a flat piece.
        self._plain = plain if plain.ndim == 2 else plain.reshape(-1, 1)
        self.rows, self.columns = self._plain.shape if self._coded is None else logical.shape
        self.step = 1 if self._coded is None else self._coded.step

    def read(self, begin: int, end: int) -> Tensor:
        if self._coded is not None:
            return self._coded.rows(begin, end)
        piece = self._plain[begin:end]
        return piece if self._reciprocal is None else 1 / piece.to(self._reciprocal)
