"""One file of a checkpoint: opened with care, its JSON strict, its header checked, every problem named.

A safetensors file is 8 bytes of header length (little-endian u64), a JSON header, then the data. The header maps a
tensor's name to `dtype`, `shape` and `data_offsets` (begin, end; relative to the end of the header); the tensors tile
the data without hole or overlap. Format: https://github.com/huggingface/safetensors#format.

Nothing here trusts a file: names, offsets and lengths are checked before they are used; no check stops the others.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.files import AGAIN, opened, pointer_error, read_at
from dsv4q.errors import SourceError
from dsv4q.layout import DTYPE_BYTES, Shape

MAX_HEADER = 100_000_000
"""Longest header that safetensors itself accepts, in bytes."""
MAX_RANK = 8

_FIRST_READ = 1 << 18


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    file: str
    """Relative to the checkpoint's root."""
    dtype: str
    """safetensors dtype name."""
    shape: Shape
    start: int
    """Offset of the data from the beginning of the file, in bytes."""
    nbytes: int


@dataclass
class Shard:
    """What one shard's header says."""

    file: str
    size: int
    """Of the whole file, in bytes."""
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    """Tensors of which the header says nothing usable."""
    readable: bool = False


# ------------------------------------------------------------------------------------------------ problems


def shown(name: str) -> str:
    """A name out of a file, fit to print: control characters and lone surrogates are escaped, length is bounded."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}…"


def few(items: Collection[str], most: int = 3) -> str:
    """The first items and the number of the others."""
    first = ", ".join(islice(items, most))
    return first if len(items) <= most else f"{first} … and {len(items) - most} more"


class Findings:
    """Problems in the order found; those of one kind in one file become one error with the exact count."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._groups: dict[tuple[str, str], list[tuple[str, SourceError]]] = defaultdict(list)

    def add(
        self,
        what: str,
        file: str,
        *,
        tensor: str | None = None,
        expected: object | None = None,
        found: object | None = None,
        hint: str | None = AGAIN,
    ) -> None:
        place = str(self.root / shown(file))
        name = "" if tensor is None else shown(tensor)
        where = place if tensor is None else f"{place}: {name}"
        self._groups[what, place].append(
            (name, SourceError(what, where=where, expected=expected, found=found, hint=hint))
        )

    def add_error(self, error: SourceError) -> None:
        self._groups[error.what, str(error.where)].append(("", error))

    def errors(self) -> tuple[SourceError, ...]:
        return tuple(self._merged(place, group) for (_, place), group in self._groups.items())

    @staticmethod
    def _merged(place: str, group: list[tuple[str, SourceError]]) -> SourceError:
        first = group[0][1]
        if len(group) == 1:
            return first
        return SourceError(
            f"{first.what} ({len(group)} times)",
            where=place,
            expected=first.expected,
            found=few([": ".join(filter(None, (name, error.found))) for name, error in group]),
            hint=first.hint,
        )


def strict_json(raw: bytes, subject: str, file: str, findings: Findings) -> object:
    """Parse UTF-8 JSON; a key that one object has twice becomes a problem.

    Raises:
        SourceError: `subject` is not valid JSON.
    """
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    try:
        value: object = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if (pointer := pointer_error(findings.root / file, raw)) is not None:
            raise pointer from error
        what = f"{subject} is not valid JSON"
        raise SourceError(what, where=findings.root / file, found=shown(str(error)), hint=AGAIN) from error
    for key in repeated:
        findings.add(f"{subject} has the same key twice", file, tensor=key)
    return value


# ------------------------------------------------------------------------------------------------ one shard


def read_shard(file: str, expected: str | None, findings: Findings) -> Shard | None:
    """Read and check one header; None when there is no such regular file. `expected`: what should be there."""
    path = findings.root / file
    shard = None
    try:
        with opened(path, expected) as (handle, size):
            shard = Shard(file, size)
            raw = _read_header(handle, size, path)
        header = strict_json(raw, "A shard's header", file, findings)
        if not isinstance(header, dict):
            found = type(header).__name__
            raise SourceError("A shard's header is not a JSON object", where=path, found=found, hint=AGAIN)
    except SourceError as error:
        findings.add_error(error)
        return shard
    shard.readable = True
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        findings.add("A shard's __metadata__ is not a map of strings", file, found=shown(repr(metadata)))
    data_start = 8 + len(raw)
    for name, info in header.items():
        entry = _parse_entry(name, info, file, data_start, findings)
        if entry is None:
            shard.unusable.add(name)
        else:
            shard.entries[name] = entry
    _check_tiling(shard, data_start, findings)
    return shard


def _read_header(handle: int, size: int, path: Path) -> bytes:
    def wrong(what: str, expected: str, found: int) -> SourceError:
        return SourceError(what, where=path, expected=expected, found=f"{found:,} bytes", hint=AGAIN)

    start = read_at(handle, 0, min(_FIRST_READ, size), path)
    if (pointer := pointer_error(path, start)) is not None:
        raise pointer
    if len(start) < 8:
        what = "A shard is too short to be a safetensors file"
        raise wrong(what, "at least 8 bytes of header length", len(start))
    end = 8 + int.from_bytes(start[:8], "little")
    if not 8 < end <= 8 + MAX_HEADER:
        raise wrong("A shard's header has an impossible length", f"1 to {MAX_HEADER:,} bytes", end - 8)
    if end > len(start):
        start += read_at(handle, len(start), end - len(start), path)
    if end > len(start):
        raise wrong("A shard ends inside its header", f"at least {end:,} bytes", size)
    return start[8:end]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_entry(name: str, info: Any, file: str, data_start: int, findings: Findings) -> TensorEntry | None:
    """One tensor of a header; None when its dtype, shape or place cannot be told."""

    def wrong(what: str, expected: str, found: object) -> None:
        findings.add(what, file, tensor=name, expected=expected, found=shown(str(found)))

    fields = info if isinstance(info, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not name or not name.isprintable():
        wrong("A tensor's name has characters that no name has", "printable characters", ascii(name))
    elif not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        form = "an object with dtype (string), shape (list) and data_offsets (list of two)"
        wrong("A tensor's header entry has the wrong form", form, repr(info))
    elif len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        wrong("A tensor has an impossible shape", f"at most {MAX_RANK} integers from 0 to 2^63-1", shape)
    elif len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        wrong("A tensor has impossible data_offsets", "two integers, 0 <= begin <= end", offsets)
    elif dtype not in DTYPE_BYTES:
        wrong("A tensor has an unknown dtype", f"one of {', '.join(DTYPE_BYTES)}", dtype)
    else:
        nbytes, needed = offsets[1] - offsets[0], math.prod(shape) * DTYPE_BYTES[dtype]
        if nbytes != needed:
            fitting = f"{needed:,} bytes for {dtype} {shape}"
            wrong("A tensor's data_offsets do not fit its dtype and shape", fitting, f"{nbytes:,} bytes")
        return TensorEntry(name, file, dtype, tuple(shape), data_start + offsets[0], nbytes)
    return None


def _check_tiling(shard: Shard, data_start: int, findings: Findings) -> None:
    """Data must be tiled by the tensors: no overlap, no hole, nothing beyond the end of the file, nothing after.

    Beside an unusable entry a hole or a rest is what its tensor leaves, so neither is called a problem.
    """
    cursor, last = data_start, "the header"
    for entry in sorted(shard.entries.values(), key=lambda e: (e.start, e.nbytes)):
        gap = entry.start - cursor
        if gap < 0 or (gap > 0 and not shard.unusable):
            findings.add(
                "A tensor's data overlaps another tensor's" if gap < 0 else "There is a hole before a tensor's data",
                shard.file,
                tensor=entry.name,
                expected="a start where the tensor before it ends",
                found=f"starts {abs(gap):,} bytes {'before' if gap < 0 else 'after'} the end of {shown(last)}",
            )
        if gap + entry.nbytes >= 0:
            cursor, last = entry.start + entry.nbytes, entry.name
    if cursor > shard.size:
        cut = sum(e.start + e.nbytes > shard.size for e in shard.entries.values())
        findings.add(
            "A shard is truncated",
            shard.file,
            expected=f"{cursor:,} bytes, the end of {shown(last)}",
            found=f"{shard.size:,} bytes; {cut} of its {len(shard.entries)} tensors are cut off",
        )
    elif cursor < shard.size and not shard.unusable:
        found = f"{shard.size:,} bytes"
        findings.add("A shard has bytes after its last tensor", shard.file, expected=f"{cursor:,} bytes", found=found)
