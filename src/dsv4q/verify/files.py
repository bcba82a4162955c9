"""Index, shard headers and files of an artifact, read with the judge's own eyes; every difference named.

`checkpoint` reads headers too, for every source. This second reader is independence on purpose: that an artifact is
whole is said by something that the run does not use.

safetensors: u64 little-endian header length, JSON header (name -> dtype, shape, data_offsets), data; the tensors tile
the data without hole or overlap. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from dsv4q.checkpoint.files import INDEX
from dsv4q.layout import DTYPE_BYTES, Shape
from dsv4q.verify.result import Log, few

MAX_HEADER = 100_000_000
"""Longest header that safetensors accepts, in bytes."""
LONE = "model.safetensors"
"""Name of a checkpoint in one file, which needs no index: small ones are saved so."""
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor as a shard's header describes it."""

    file: str
    dtype: str
    shape: Shape
    start: int
    """Of the data, from the beginning of the file."""
    nbytes: int
    whole: bool
    """The file is long enough to hold it."""

    def text(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Headers:
    """All that lies in an artifact's shards."""

    holders: dict[str, list[Header]]
    """Tensor name -> where it lies; more than one place is a difference."""
    unread: frozenset[str]
    """Shards that could not be read."""
    index: dict[str, str]
    """Tensor name -> shard file, as the index says; empty without a usable index."""
    total_size: object
    """As the index says."""
    sizes: dict[str, int]
    """Shard -> bytes of the file, of those that could be read."""
    on_disk: frozenset[str]
    """Shards in the folder."""

    @property
    def shards(self) -> int:
        return len(self.on_disk)

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for headers in self.holders.values() for header in headers)


# ------------------------------------------------------------------------------------------------ files


def check_files(root: Path, headers: Headers, recipe: bool, log: Log) -> None:
    """The files that must be there (`recipe`: recipe.yaml too), all readable by others; no remains of a run."""
    index = [] if headers.on_disk == {LONE} and not headers.index else [INDEX]
    required = ["config.json", *index, *(["recipe.yaml"] if recipe else []), *sorted(set(headers.index.values()))]
    for name in required:
        log.looked_at("files")
        try:
            mode = (root / name).stat().st_mode
        except (OSError, ValueError):
            log.differs("files", file=name, expected="a file of this name in the artifact's folder", found="none")
            continue
        if not stat.S_ISREG(mode):
            log.differs("files", file=name, expected="a regular file", found=stat.filemode(mode))
    _check_modes(root, log)
    for path in sorted(root.iterdir()):
        if path.name.endswith((".partial", ".tmp")) or path.name == ".dsv4q":
            log.differs("files", file=path.name, expected="no remains of an unfinished run", found=path.name)


def _check_modes(root: Path, log: Log) -> None:
    """Who serves the artifact is seldom who made it: every file may be read, every folder in it be entered, by all."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            log.differs("files", file=str(name), expected="a file", found=error.strerror)
            continue
        wanted, kind = (0o555, "folder") if stat.S_ISDIR(mode) else (0o444, "file")
        if mode & wanted != wanted and (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            expected = f"a {kind} that everybody may read ({'0755' if kind == 'folder' else '0644'})"
            log.differs("files", file=str(name), expected=expected, found=f"{stat.S_IMODE(mode):04o}")


def _check_names(files: Sequence[str], named: set[str], log: Log) -> None:
    """`model-00001-of-000NN.safetensors`, complete from 1 to N; or one file alone, of which no index speaks."""
    if files == [LONE] and not named:
        return
    matches = {file: _SHARD.fullmatch(file) for file in files}
    for file, match in matches.items():
        if match is None:
            log.differs("index", file=file, expected="model-00001-of-000NN.safetensors", found=file)
    totals = Counter(int(match[2]) for match in matches.values() if match)
    if not totals:
        log.differs("index", file=INDEX, expected="shards model-00001-of-000NN.safetensors", found="none")
        return
    total = totals.most_common(1)[0][0]
    for number in range(1, total + 1):
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        if name not in matches and name not in named:  # a shard that the index names is reported as a missing file
            log.differs("index", file=name, expected=f"all {total} shards", found="this one is missing")
    for file, match in matches.items():
        if match and (int(match[2]) != total or not 1 <= int(match[1]) <= total):
            log.differs("index", file=file, expected=f"shards 1 to {total} of {total}", found=file)


# ------------------------------------------------------------------------------------------------ headers


def read_shards(root: Path, log: Log) -> Headers:
    """Every shard that lies in the folder or that the index names."""
    index, total_size = _read_index(root, log)
    on_disk = {path.name for path in root.iterdir() if path.name.endswith(".safetensors")}
    named = set(index.values())
    holders: dict[str, list[Header]] = defaultdict(list)
    unread = set(named - on_disk)
    files = sorted(on_disk)
    _check_names(files, named, log)
    sizes: dict[str, int] = {}
    for file in files:
        read = read_header(root, file, log)
        if read is None:
            unread.add(file)
            continue
        sizes[file], entries = read
        for name, header in entries.items():
            holders[name].append(header)
    return Headers(dict(holders), frozenset(unread), index, total_size, sizes, frozenset(on_disk))


def _read_index(root: Path, log: Log) -> tuple[dict[str, str], object]:
    """weight_map and total_size; empty when the index is no use."""
    path = root / INDEX
    if not path.is_file():
        return {}, None  # the file check says so
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        log.differs("index", file=INDEX, expected="a JSON object", found=error)
        return {}, None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        log.differs("index", file=INDEX, expected="weight_map: tensor name -> file name", found=repr(weight_map)[:80])
        return {}, None
    metadata = index.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def read_header(root: Path, file: str, log: Log) -> tuple[int, dict[str, Header]] | None:
    """Size of one shard and its tensors; None when the header says nothing usable. The data itself is not read.

    safetensors: u64 little-endian header length, JSON header, data; tensors tile the data without hole or overlap.
    """

    def bad(expected: str, found: object, tensor: str | None = None) -> None:
        log.differs("headers", tensor=tensor, file=file, expected=expected, found=str(found)[:120])

    log.looked_at("headers")
    path = root / file
    try:
        if not path.is_file():
            bad("a regular file", "something else")
            return None
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                bad(f"a header length that fits {size:,} bytes", f"{length:,}")
                return None
            header = _header_json(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        bad("a header that can be read", error)
        return None
    if not isinstance(header, dict):
        bad("a JSON object as header", type(header).__name__)
        return None
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        bad("__metadata__ with strings alone, or safetensors refuses the file", repr(metadata))
    entries = {}
    for name, info in header.items():
        entry = _entry(file, info, 8 + length, size)
        if entry is None:
            bad("dtype, shape and data_offsets that agree", repr(info), ascii(name)[1:-1])
        else:
            entries[name] = entry
    _check_tiling(entries, 8 + length, size, bad)
    return size, entries


def _header_json(raw: bytes) -> object:
    """As strict as safetensors is, and the format: UTF-8, numbers that are some, each key once.

    Raises:
        ValueError: it is not; says why.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice!a} is there twice")
        "".join(made).encode()  # a lone surrogate is no text
        return made

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)


def _entry(file: str, info: object, base: int, size: int) -> Header | None:
    if not isinstance(info, dict):
        return None
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not (isinstance(dtype, str) and dtype in DTYPE_BYTES and _naturals(shape) and _naturals(offsets)):
        return None
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        return None
    whole = base + offsets[1] <= size
    return Header(file, dtype, tuple(shape), base + offsets[0], offsets[1] - offsets[0], whole)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(entries: Mapping[str, Header], base: int, size: int, bad: Callable[..., None]) -> None:
    end = base
    for name, header in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if header.start != end:
            bad(f"data at offset {end:,}, where the tensor before it ends", f"{header.start:,}", name)
        end = max(end, header.start + header.nbytes)
    if size != end:
        bad(f"{end:,} bytes, as its header says", f"{size:,} bytes")


def check_index(headers: Headers, log: Log) -> None:
    """Index and headers agree in both directions; total_size is the exact sum."""
    if not headers.index:
        return
    for file, count in Counter(headers.index.values()).items():
        # Readers compare names as text: another way to the same file is another file, or none.
        if file not in headers.on_disk and not _SHARD.fullmatch(file):
            found = f"{file!a} for {count:,} tensors"
            log.differs("index", file=INDEX, expected="plain names of shards, model-00001-of-000NN", found=found)
    for name, file in headers.index.items():
        log.looked_at("index")
        holders = headers.holders.get(name, [])
        if file not in headers.unread and file not in [holder.file for holder in holders]:
            found = f"in {few([holder.file for holder in holders])}" if holders else "in no shard"
            log.differs(
                "index", tensor=name, file=file, expected="the tensor in the shard that the index names", found=found
            )
    for name, holders in headers.holders.items():
        if name not in headers.index:
            log.differs("index", tensor=name, file=holders[0].file, expected="an entry in the index", found="none")
        if len(holders) > 1:
            log.differs(
                "index", tensor=name, file=holders[1].file, expected="one copy", found=f"also in {holders[0].file}"
            )
    total = headers.total_size
    if not headers.unread and (type(total) is not int or total != headers.nbytes):
        log.differs("index", file=INDEX, expected=f"total_size {headers.nbytes}", found=repr(total))
