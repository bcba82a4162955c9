"""A checkpoint as it lies on disk: headers first, bytes on demand, every problem named.

A safetensors file is 8 bytes of header length (little-endian u64), a JSON header, then the data. The header maps a
tensor's name to `dtype`, `shape` and `data_offsets` (begin, end; relative to the end of the header); the tensors tile
the data without hole or overlap. Format: https://github.com/huggingface/safetensors#format. The index of several shards
is `model.safetensors.index.json`: `weight_map` (tensor -> file) and `metadata.total_size` (bytes of data).

Nothing here trusts the files: names, offsets and lengths are checked before they are used; no check stops the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
import re
import stat
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.layout import DTYPE_BYTES, Dims, Role, TensorSpec, load_config, source_tensors
from dsv4q.errors import SourceError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Longest header that safetensors itself accepts, in bytes."""
MAX_INDEX = 256 << 20
MAX_CONFIG = 16 << 20
MAX_RANK = 8
SAMPLES, SAMPLE_BYTES = 16, 4096

_FIRST_READ = 1 << 18
_AGAIN = "download this file again"
_SERIES = re.compile(r"(?P<prefix>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_MTP = re.compile(r"mtp\.(\d+)\.([^.]+)")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    file: str
    """Relative to the checkpoint's root."""
    dtype: str
    """safetensors dtype name."""
    shape: tuple[int, ...]
    start: int
    """Offset of the data from the beginning of the file, in bytes."""
    nbytes: int


# ------------------------------------------------------------------------------------------------ problems


def _shown(name: str) -> str:
    """A name out of a file, fit to print: control characters and lone surrogates are escaped, length is bounded."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _few(items: Collection[str], most: int = 3) -> str:
    first = ", ".join(item for item, _ in zip(items, range(most), strict=False))
    return first if len(items) <= most else f"{first} … and {len(items) - most} more"


class _Findings:
    """Problems in the order found; those of one kind in one file become one error with the exact count."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._groups: dict[tuple[str, str], list[tuple[str | None, SourceError]]] = defaultdict(list)

    def add(
        self,
        what: str,
        file: str,
        *,
        tensor: str | None = None,
        expected: object | None = None,
        found: object | None = None,
        hint: str | None = _AGAIN,
    ) -> None:
        place = str(self._root / _shown(file))
        where = place if tensor is None else f"{place}: {_shown(tensor)}"
        error = SourceError(what, where=where, expected=expected, found=found, hint=hint)
        self._groups[what, place].append((tensor, error))

    def add_error(self, error: SourceError) -> None:
        self._groups[error.what, str(error.where)].append((None, error))

    def errors(self) -> tuple[SourceError, ...]:
        return tuple(self._merged(place, group) for (_, place), group in self._groups.items())

    @staticmethod
    def _merged(place: str, group: list[tuple[str | None, SourceError]]) -> SourceError:
        first = group[0][1]
        if len(group) == 1:
            return first
        each = [f"{_shown(t or '')}: {e.found}" if e.found and t else _shown(t or str(e.found)) for t, e in group]
        return SourceError(
            f"{first.what} ({len(group)} times)",
            where=place,
            expected=first.expected,
            found=_few(each),
            hint=first.hint,
        )


# ------------------------------------------------------------------------------------------------ files


def _open_regular(path: Path, expected: str | None = None) -> tuple[int, int]:
    """Open a regular file for reading; returns descriptor and size. O_NONBLOCK so that a FIFO cannot hang us."""

    def refused(what: str, found: object) -> SourceError:
        return SourceError(what, where=path, expected=expected, found=found, hint=_AGAIN)

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise refused("A file of the checkpoint is not there", "no such file") from None
    except (OSError, ValueError) as error:
        raise refused("A file of the checkpoint cannot be opened", error) from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise refused("A file of the checkpoint is not a regular file", kind)
    return handle, status.st_size


def _fill(handle: int, buffer: memoryview, offset: int, where: Path) -> int:
    """Read into `buffer` (bytes) from `offset` until it is full or the file ends; returns the bytes read."""
    done = 0
    try:
        while done < len(buffer):
            count = os.preadv(handle, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
    except OSError as error:
        raise SourceError("Reading the checkpoint failed", where=where, found=error, hint="check the disk") from error
    return done


def _read_at(handle: int, offset: int, length: int, where: Path) -> bytes:
    """Up to `length` bytes; fewer only where the file ends."""
    buffer = bytearray(length)
    return bytes(buffer[: _fill(handle, memoryview(buffer), offset, where)])


class _Handles:
    """Open files of one checkpoint, shared by reading threads (preadv has no file position to share)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}

    def get(self, path: Path, size: int) -> int:
        with self._lock:
            if path not in self._open:
                handle, now = _open_regular(path)
                if now != size:
                    os.close(handle)
                    raise SourceError(
                        "A shard changed while it was in use",
                        where=path,
                        expected=f"{size:,} bytes, as when its header was read",
                        found=f"{now:,} bytes",
                        hint="leave the source alone during a run, then start again",
                    )
                self._open[path] = handle
            return self._open[path]

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers, and the way to its bytes. Reading is safe from several threads; closing is not."""

    root: Path
    config: dict[str, Any]
    """Parsed config.json."""
    tensors: dict[str, TensorEntry]
    files: dict[str, int]
    """Shard file name -> size on disk in bytes."""
    problems: tuple[SourceError, ...]
    """Everything found wrong in index and headers."""
    has_weights: bool
    """False when the folder (or file) holds only a config.json."""
    config_file: Path
    unread: frozenset[str] = frozenset()
    """Tensors that index or headers promise, of which a problem hides dtype and shape: neither there nor missing."""
    _handles: _Handles = field(default_factory=_Handles, repr=False, compare=False)

    def read(self, name: str) -> memoryview:
        """Raw bytes of one tensor, in memory of its own.

        Raises:
            SourceError: no such tensor, the file changed or ends early, the disk fails.
        """
        buffer = memoryview(bytearray(self._entry(name).nbytes))
        self.read_into(name, buffer)
        return buffer

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Read one tensor's raw bytes into `buffer`: writable, contiguous, exactly the tensor's size.

        Raises:
            ValueError: a buffer of another size (a defect of the caller).
            SourceError: as `read`.
        """
        entry = self._entry(name)
        if buffer.nbytes != entry.nbytes:
            raise ValueError(f"{name} has {entry.nbytes} bytes, the buffer {buffer.nbytes}")
        if entry.nbytes == 0:
            return
        path = self.root / entry.file
        handle = self._handles.get(path, self.files[entry.file])
        count = _fill(handle, buffer.cast("B"), entry.start, path)
        if count != entry.nbytes:
            raise SourceError(
                "A shard ends inside a tensor",
                where=f"{path}: {_shown(name)}",
                expected=f"{entry.nbytes:,} bytes from offset {entry.start:,}",
                found=f"{count:,} bytes",
                hint=_AGAIN,
            )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor with its dtype and shape, on the CPU, in memory of its own.

        Raises:
            SourceError: as `read`; a dtype that torch lacks; a size that is not that of dtype and shape.
        """
        import torch

        entry = self._entry(name)
        dtype = getattr(torch, _TORCH_NAMES.get(entry.dtype, ""), None)
        if dtype is None or math.prod(entry.shape) * DTYPE_BYTES[entry.dtype] != entry.nbytes:
            raise SourceError(
                "A tensor cannot be made of these bytes",
                where=f"{self.root / entry.file}: {_shown(name)}",
                found=f"{entry.nbytes:,} bytes as {_shown(entry.dtype)} {list(entry.shape)}",
                hint=_AGAIN,
            )
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self.read_into(name, raw.numpy().data)
        return raw.view(dtype).reshape(entry.shape) if entry.nbytes else torch.empty(entry.shape, dtype=dtype)

    def fingerprint(self) -> dict[str, Any]:
        """The source's identity as JSON: digests of config.json, of every shard's header and of samples of its data.

        Samples: 16 pieces of 4 KiB spread evenly over the data, its first and last bytes among them. Two checkpoints
        of the same shapes whose tensors differ throughout (a fine-tune) differ here; a change of a few bytes between
        the samples is not seen.
        """
        shards = {}
        for file, size in sorted(self.files.items()):
            path = self.root / file
            handle = self._handles.get(path, size)
            header = min(8 + int.from_bytes(_read_at(handle, 0, 8, path), "little"), size, 8 + MAX_HEADER)
            samples = hashlib.sha256()
            for offset, length in _sample_extents(header, size):
                samples.update(_read_at(handle, offset, length, path))
            shards[file] = {
                "size": size,
                "header_sha256": hashlib.sha256(_read_at(handle, 0, header, path)).hexdigest(),
                "samples_sha256": samples.hexdigest(),
            }
        return {"config_sha256": hashlib.sha256(self.config_file.read_bytes()).hexdigest(), "files": shards}

    def close(self) -> None:
        """Close the files; no read may be under way. A later read opens them again."""
        self._handles.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise SourceError("The checkpoint has no such tensor", where=f"{self.root}: {_shown(name)}")
        return self.tensors[name]


_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def _sample_extents(begin: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of the samples of the bytes begin..end; all of them where there are few."""
    if end - begin <= SAMPLES * SAMPLE_BYTES:
        return [(begin, end - begin)]
    room = end - begin - SAMPLE_BYTES
    return [(begin + room * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


# ------------------------------------------------------------------------------------------------ JSON


def _strict_json(raw: bytes) -> tuple[object, list[str]]:
    """Parse UTF-8 JSON; returns the value and the keys that one object has twice. Raises ValueError."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse), repeated
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _is_int(value: object, most: int = 2**63 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


# ------------------------------------------------------------------------------------------------ one shard


@dataclass
class _Shard:
    """What one shard's header says."""

    file: str
    size: int
    data_start: int = 0
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    """Tensors of which the header says nothing usable."""
    readable: bool = False


def _read_shard(root: Path, file: str, promised: int, findings: _Findings) -> _Shard | None:
    """Read and check one header; None when there is no such regular file. `promised`: tensors the index puts there."""
    expected = f"a shard with {promised:,} tensor{'s' * (promised != 1)}, as {INDEX} says" if promised else None
    try:
        handle, size = _open_regular(root / file, expected)
    except SourceError as error:
        findings.add_error(error)
        return None
    shard = _Shard(file, size)
    try:
        raw = _read_header(handle, root / file, shard, findings)
    except SourceError as error:
        findings.add_error(error)
        return shard
    finally:
        os.close(handle)
    if raw is not None:
        _parse_header(raw, shard, findings)
    return shard


def _read_header(handle: int, path: Path, shard: _Shard, findings: _Findings) -> bytes | None:
    start = _read_at(handle, 0, min(_FIRST_READ, shard.size), path)
    if len(start) < 8:
        findings.add(
            "A shard is too short to be a safetensors file",
            shard.file,
            expected="at least 8 bytes of header length",
            found=f"{len(start)} bytes",
        )
        return None
    length = int.from_bytes(start[:8], "little")
    shard.data_start = 8 + length
    if not 0 < length <= MAX_HEADER:
        findings.add(
            "A shard's header has an impossible length",
            shard.file,
            expected=f"1 to {MAX_HEADER:,} bytes",
            found=f"{length:,} bytes",
        )
        return None
    raw = start[8 : 8 + length]
    if 8 + length > len(start):
        raw += _read_at(handle, len(start), 8 + length - len(start), path)
    if len(raw) < length:
        findings.add(
            "A shard ends inside its header",
            shard.file,
            expected=f"at least {8 + length:,} bytes",
            found=f"{shard.size:,} bytes",
        )
        return None
    return raw


def _parse_header(raw: bytes, shard: _Shard, findings: _Findings) -> None:
    try:
        header, repeated = _strict_json(raw)
    except ValueError as error:
        findings.add("A shard's header is not valid JSON", shard.file, found=_shown(str(error)))
        return
    if not isinstance(header, dict):
        findings.add("A shard's header is not a JSON object", shard.file, found=type(header).__name__)
        return
    shard.readable = True
    for key in repeated:
        findings.add("A shard's header has the same key twice", shard.file, tensor=key)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        findings.add("A shard's __metadata__ is not a map of strings", shard.file, found=_shown(repr(metadata)))
    for name, info in header.items():
        entry = _parse_entry(name, info, shard, findings)
        if entry is None:
            shard.unusable.add(name)
        else:
            shard.entries[name] = entry
    _check_tiling(shard, findings)


def _parse_entry(name: str, info: object, shard: _Shard, findings: _Findings) -> TensorEntry | None:
    """One tensor of a header; None when its dtype, shape or place cannot be told."""

    def wrong(what: str, expected: str, found: object) -> None:
        findings.add(what, shard.file, tensor=name, expected=expected, found=_shown(str(found)))

    if not name.isprintable() or not name:
        wrong("A tensor's name has characters that no name has", "printable characters", ascii(name))
        return None
    form = "an object with dtype (string), shape (list) and data_offsets (list of two)"
    if not isinstance(info, dict):
        wrong("A tensor's header entry has the wrong form", form, f"{type(info).__name__} {info!r}")
        return None
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        wrong("A tensor's header entry has the wrong form", form, repr(info))
        return None
    if len(shape) > MAX_RANK or not all(map(_is_int, shape)):
        wrong("A tensor has an impossible shape", f"at most {MAX_RANK} integers from 0 to 2^63-1", shape)
        return None
    if len(offsets) != 2 or not all(map(_is_int, offsets)) or offsets[0] > offsets[1]:
        wrong("A tensor has impossible data_offsets", "two integers, 0 <= begin <= end", offsets)
        return None
    begin, end = offsets
    if dtype not in DTYPE_BYTES:
        wrong("A tensor has an unknown dtype", f"one of {', '.join(DTYPE_BYTES)}", dtype)
        return None
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        size = f"{math.prod(shape) * DTYPE_BYTES[dtype]:,} bytes for {dtype} {shape}"
        wrong("A tensor's data_offsets do not fit its dtype and shape", size, f"{end - begin:,} bytes")
    return TensorEntry(name, shard.file, dtype, tuple(shape), shard.data_start + begin, end - begin)


def _check_tiling(shard: _Shard, findings: _Findings) -> None:
    """Data must be tiled by the tensors: no overlap, no hole, nothing beyond the end of the file, nothing after."""
    cursor, last = shard.data_start, "the header"
    for entry in sorted(shard.entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start < cursor:
            findings.add(
                "A tensor's data overlaps another tensor's",
                shard.file,
                tensor=entry.name,
                expected="a start where the tensor before it ends",
                found=f"starts {cursor - entry.start:,} bytes before the end of {_shown(last)}",
            )
        elif entry.start > cursor and not shard.unusable:
            findings.add(
                "There is a hole before a tensor's data",
                shard.file,
                tensor=entry.name,
                expected="a start where the tensor before it ends",
                found=f"starts {entry.start - cursor:,} bytes after the end of {_shown(last)}",
            )
        if entry.start + entry.nbytes >= cursor:
            cursor, last = entry.start + entry.nbytes, entry.name
    if cursor > shard.size:
        cut = sum(e.start + e.nbytes > shard.size for e in shard.entries.values())
        findings.add(
            "A shard is truncated",
            shard.file,
            expected=f"{cursor:,} bytes, the end of {_shown(last)}",
            found=f"{shard.size:,} bytes; {cut} of its {len(shard.entries)} tensors are cut off",
        )
    elif cursor < shard.size and not shard.unusable:
        findings.add(
            "A shard has bytes after its last tensor",
            shard.file,
            expected=f"{cursor:,} bytes",
            found=f"{shard.size:,} bytes",
        )


# ------------------------------------------------------------------------------------------------ index


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    total_size: object | None


def _read_index(root: Path, findings: _Findings) -> _Index | None:
    """The index, less what is unusable in it; None when it is absent or useless."""
    path = root / INDEX
    if not os.path.lexists(path):
        return None
    try:
        handle, size = _open_regular(path)
        try:
            raw = _read_at(handle, 0, min(size, MAX_INDEX + 1), path)
        finally:
            os.close(handle)
    except SourceError as error:
        findings.add_error(error)
        return None
    if len(raw) > MAX_INDEX:
        findings.add("The index is too large to be one", INDEX, expected=f"at most {MAX_INDEX:,} bytes", found=size)
        return None
    try:
        value, repeated = _strict_json(raw)
    except ValueError as error:
        findings.add("The index is not valid JSON", INDEX, found=_shown(str(error)))
        return None
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(weight_map, dict) or not weight_map:
        found = (
            "no such key" if weight_map is None else "an empty one" if weight_map == {} else type(weight_map).__name__
        )
        findings.add("The index has no weight_map", INDEX, expected="an object: tensor name -> file name", found=found)
        return None
    for key in repeated:
        findings.add("The index has the same key twice", INDEX, tensor=key)
    for name, file in weight_map.items():
        if not isinstance(file, str):
            findings.add(
                "The index gives no file name for a tensor", INDEX, tensor=name, expected="a string", found=repr(file)
            )
    metadata = value.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _Index({n: f for n, f in weight_map.items() if isinstance(f, str)}, total)


def _bad_file_name(file: str) -> str | None:
    """Why this file name cannot be followed, or None."""
    if not file.isprintable() or "\\" in file:
        return "it has a backslash, NUL or another unprintable character"
    if file.startswith("/"):
        return "it is an absolute path"
    if ".." in file.split("/"):
        return "it climbs out of the folder"
    if not file.endswith(".safetensors"):
        return "it is not a .safetensors file"
    if posixpath.normpath(file) != file:
        return "it is not in its plain form"
    return None


def _usable_files(root: Path, files: Iterable[str], findings: _Findings, named_in: str) -> list[str]:
    """Those of `files` that stay inside `root`; the others become problems."""
    usable: list[str] = []
    links: list[str] = []
    real_root = os.path.realpath(root)
    for file in files:
        reason = _bad_file_name(file)
        if reason is not None:
            findings.add(
                "A shard's file name is refused",
                named_in,
                expected="the name of a .safetensors file inside the checkpoint folder",
                found=f"{_shown(file)}: {reason}",
                hint="correct the index, or download the checkpoint again",
            )
        elif os.path.commonpath([real_root, os.path.realpath(root / file)]) != real_root:
            links.append(file)
        else:
            usable.append(file)
    if links:
        findings.add(
            "A symbolic link leads out of the checkpoint folder"
            if len(links) == 1
            else f"{len(links)} symbolic links lead out of the checkpoint folder",
            "",
            expected="shards inside the folder",
            found=_few([f"{_shown(f)} -> {_shown(os.path.realpath(root / f))}" for f in links]),
            hint="make real files of them: `cp -rL FOLDER NEW_FOLDER`, or `hf download … --local-dir NEW_FOLDER`",
        )
    return usable


def _folder_files(root: Path) -> list[str]:
    """Names of the safetensors files that lie in the folder, whatever they are; hidden ones are not a checkpoint's."""
    try:
        return sorted(n for n in os.listdir(root) if n.endswith(".safetensors") and not n.startswith("."))
    except OSError as error:
        raise SourceError("The checkpoint folder cannot be read", where=root, found=error) from error


def _check_lone_files(files: Sequence[str], findings: _Findings) -> None:
    """Without an index, only a single shard that is not one of a series is a whole checkpoint."""
    series = _SERIES.fullmatch(files[0])
    if len(files) > 1 or (series is not None and int(series["total"][:9]) > 1):
        findings.add(
            "The index is missing",
            INDEX,
            expected=f"{INDEX} beside {len(files)} shard{'s' if len(files) > 1 else ' of a series'}",
            found=_few([_shown(f) for f in files]),
            hint="download the index; without it nobody can tell whether a shard is missing",
        )


def _check_strays(on_disk: Sequence[str], named: Collection[str], findings: _Findings) -> None:
    """A shard of the index's own series that the index does not name: index and shards are of two downloads."""
    sets = {(m["prefix"], m["total"]) for m in map(_SERIES.fullmatch, named) if m}
    for file in on_disk:
        match = _SERIES.fullmatch(file)
        if file not in named and match and (match["prefix"], match["total"]) in sets:
            findings.add(
                "A shard of the series is not named by the index",
                file,
                expected=f"every {match['prefix']}-*-of-{match['total']}.safetensors in {INDEX}",
                hint="download the index again, or remove the file if it is a leftover",
            )


def _check_index(index: _Index, shards: dict[str, _Shard], findings: _Findings) -> None:
    """Index and headers must say the same: each tensor in the file that the index gives, no more and no fewer."""
    holders: dict[str, list[str]] = defaultdict(list)
    for shard in shards.values():
        for name in (*shard.entries, *shard.unusable):
            holders[name].append(shard.file)
    for name, file in index.weight_map.items():
        shard_or_none = shards.get(file)
        if shard_or_none is not None and shard_or_none.readable and file not in holders[name]:
            found = f"in {_few([_shown(f) for f in holders[name]])}" if holders[name] else "in no shard"
            findings.add("The index puts a tensor where it is not", file, tensor=name, expected="here", found=found)
    for name, files in holders.items():
        if name not in index.weight_map:
            findings.add(
                "A shard has a tensor that the index does not name",
                files[0],
                tensor=name,
                hint="download index and shards again, of one revision",
            )
    _check_total(index, shards, findings)


def _check_doubles(shards: dict[str, _Shard], findings: _Findings) -> None:
    seen: dict[str, str] = {}
    for shard in shards.values():
        for name in shard.entries:
            if name in seen:
                findings.add(
                    "A tensor lies in two shards",
                    shard.file,
                    tensor=name,
                    expected="one",
                    found=f"also in {_shown(seen[name])}",
                    hint="download index and shards again, of one revision",
                )
            seen.setdefault(name, shard.file)


def _check_total(index: _Index, shards: dict[str, _Shard], findings: _Findings) -> None:
    whole = all(f in shards and shards[f].readable and not shards[f].unusable for f in index.weight_map.values())
    total = sum(entry.nbytes for shard in shards.values() for entry in shard.entries.values())
    # Old transformers releases wrote the number as a float, so numbers are compared, not types.
    if index.total_size is not None and whole and (isinstance(index.total_size, bool) or index.total_size != total):
        findings.add(
            "The index's total_size is not the size of the tensors",
            f"{INDEX}: metadata.total_size",
            expected=f"{total:,} bytes",
            found=_shown(repr(index.total_size)),
            hint="download index and shards again, of one revision",
        )


# ------------------------------------------------------------------------------------------------ scan


def scan(path: Path) -> Checkpoint:
    """Read config.json, index and every header; no tensor data.

    Args:
        path: checkpoint folder, or a folder or file with just a config.json.

    Raises:
        SourceError: config.json absent or unreadable. Every other problem goes into `Checkpoint.problems`.
    """
    config_file = path / "config.json" if path.is_dir() else path
    config = _load_config(config_file)
    if not path.is_dir():
        return Checkpoint(path.parent, config, {}, {}, (), has_weights=False, config_file=config_file)
    findings = _Findings(path)
    index = _read_index(path, findings)
    on_disk = _folder_files(path)
    if index is not None:
        named = list(dict.fromkeys(index.weight_map.values()))
        files = _usable_files(path, named, findings, INDEX)
        _check_strays(on_disk, named, findings)
    else:
        files = _usable_files(path, on_disk, findings, "")
        if on_disk and not os.path.lexists(path / INDEX):
            _check_lone_files(on_disk, findings)
    promises = Counter(index.weight_map.values() if index is not None else ())
    read = {file: _read_shard(path, file, promises[file], findings) for file in sorted(files)}
    shards = {file: shard for file, shard in read.items() if shard is not None}
    _check_doubles(shards, findings)
    if index is not None:
        _check_index(index, shards, findings)
    tensors = _tensors(index, shards)
    promised = {n for shard in shards.values() for n in shard.unusable}
    if index is not None:
        promised |= {n for n, f in index.weight_map.items() if f not in shards or not shards[f].readable}
    return Checkpoint(
        path,
        config,
        tensors,
        {shard.file: shard.size for shard in shards.values()},
        findings.errors(),
        has_weights=bool(on_disk) or os.path.lexists(path / INDEX),
        config_file=config_file,
        unread=frozenset(promised - tensors.keys()),
    )


def _load_config(file: Path) -> dict[str, Any]:
    try:
        if file.is_file() and file.stat().st_size > MAX_CONFIG:
            raise SourceError(
                "This is too large to be a config.json",
                where=file,
                expected=f"at most {MAX_CONFIG:,} bytes",
                found=f"{file.stat().st_size:,} bytes",
                hint="give the checkpoint folder, not one of its shards",
            )
        return load_config(file)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError("config.json cannot be read", where=file, found=error) from error


def _tensors(index: _Index | None, shards: dict[str, _Shard]) -> dict[str, TensorEntry]:
    """All tensors by name; of one that lies in two shards, the one that the index means."""
    tensors: dict[str, TensorEntry] = {}
    for shard in shards.values():
        for name, entry in shard.entries.items():
            if name not in tensors or (index is not None and index.weight_map.get(name) == shard.file):
                tensors[name] = entry
    return tensors


def open_checkpoint(path: Path) -> Checkpoint:
    """`scan`, then refuse a checkpoint that has any problem.

    Raises:
        SourceError: the first problem; its hint tells how many more there are.
    """
    checkpoint = scan(path)
    if not checkpoint.problems:
        return checkpoint
    first, more = checkpoint.problems[0], len(checkpoint.problems) - 1
    also = f"there {'is' if more == 1 else 'are'} {more} more problem{'s' * (more != 1)}: `dsv4q plan {path}` shows all"
    hints = [hint for hint in (first.hint, also if more else None) if hint]
    raise SourceError(
        first.what, where=first.where, expected=first.expected, found=first.found, hint="; ".join(hints) or None
    )


# ------------------------------------------------------------------------------------------------ layout


def draft_kind(names: Iterable[str]) -> str:
    """What lies under `mtp.`: 'none', 'mtp' (every layer has enorm and hnorm), 'dspark' (a Markov head and neither
    norm; published under the same prefix) or 'unknown'."""
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if name.startswith("mtp."):
            match = _MTP.match(name)
            parts[match[1] if match else ""].add(match[2] if match else name)
    norms = {"enorm", "hnorm"}
    if not parts:
        return "none"
    if all(norms <= found for found in parts.values()):
        return "mtp"
    every = set().union(*parts.values())
    return "dspark" if not norms & every and any("markov" in part for part in every) else "unknown"


@dataclass
class _Difference:
    """How a checkpoint differs from the layout. Special cases take out what they explain."""

    checkpoint: Checkpoint
    specs: dict[str, TensorSpec]
    missing: dict[str, TensorSpec]
    extra: dict[str, TensorEntry]
    dtype: dict[str, TensorEntry]
    shape: dict[str, TensorEntry]

    @classmethod
    def of(cls, checkpoint: Checkpoint, dims: Dims) -> _Difference:
        specs = {spec.name: spec for spec in source_tensors(dims)}
        there = checkpoint.tensors
        both = [name for name in specs if name in there]
        return cls(
            checkpoint,
            specs,
            missing={n: s for n, s in specs.items() if n not in there and n not in checkpoint.unread},
            extra={n: e for n, e in there.items() if n not in specs},
            dtype={n: there[n] for n in both if there[n].dtype != specs[n].dtype},
            shape={n: there[n] for n in both if there[n].shape != specs[n].shape},
        )

    def explain(self, names: Iterable[str]) -> None:
        """Leave these names out of the errors still to come."""
        for name in names:
            for part in (self.missing, self.extra, self.dtype, self.shape):
                part.pop(name, None)

    def blocks(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Names by block, main blocks in the layout's order, what belongs to none at the end."""
        groups: dict[str, list[str]] = {spec.block: [] for spec in self.specs.values()}
        for name in names:
            groups.setdefault(self.specs[name].block if name in self.specs else _block_of(name), []).append(name)
        return {block: group for block, group in groups.items() if group}


def _block_of(name: str) -> str:
    match = re.match(r"(layers|mtp)\.\d+(?=\.)", name)
    return match[0] if match else "no block"


def compare_with_layout(checkpoint: Checkpoint, dims: Dims) -> list[SourceError]:
    """Exact comparison of names, dtypes and shapes with `layout.source_tensors(dims)`.

    One error for each kind of difference and block, with the exact count and the first names; a difference that has
    one known cause (another vocabulary, a quantized release, a draft that config.json does not describe) is one error.
    Tensors that `checkpoint.problems` already accounts for are not called missing. No weights: nothing to compare.
    """
    if not checkpoint.has_weights:
        return []
    diff = _Difference.of(checkpoint, dims)
    errors = [*_transformers_names(diff), *_already_quantized(diff), *_draft(diff, dims)]
    errors += [*_missing_blocks(diff), *_missing_experts(diff, dims)]
    errors += _by_block(
        diff, diff.missing, "missing", "download the checkpoint again, or correct the sizes in config.json"
    )
    errors += _by_block(
        diff,
        diff.extra,
        "too many",
        "see whether config.json belongs to these files, and remove what is not the model's",
    )
    errors += _by_block(diff, diff.dtype, "of another dtype", "convert the checkpoint again, keeping F32 tensors F32")
    errors += _by_block(diff, diff.shape, "of another shape", "see whether config.json belongs to these files")
    return errors


def _transformers_names(diff: _Difference) -> list[SourceError]:
    by_hf = {spec.hf_name: spec.name for spec in diff.specs.values()}
    names = [name for name in diff.extra if name in by_hf]
    if not names:
        return []
    diff.explain([*names, *(by_hf[name] for name in names)])
    return [
        SourceError(
            f"{len(names):,} tensors have transformers' names instead of DeepSeek's",
            where=diff.checkpoint.root,
            expected=f"upstream names such as {by_hf[names[0]]}",
            found=_few(names),
            hint="use the original checkpoint; one saved by transformers has lost its mtp.* tensors",
        )
    ]


_OURS = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "U8", "I8")


def _already_quantized(diff: _Difference) -> list[SourceError]:
    ours = [name for name in diff.extra if name.endswith(_OURS)]
    scales = [n for n in diff.extra if n.endswith(".scale") and f"{n.removesuffix('.scale')}.weight" in diff.specs]
    low = [n for n, e in diff.dtype.items() if e.dtype in _EIGHT_BITS and diff.specs[n].dtype == "BF16"]
    if not ours and not scales and not low:
        return []
    packed = [f"{name.removesuffix('.weight_packed')}.weight" for name in ours]
    diff.explain([*ours, *scales, *low, *packed])
    counts = Counter(diff.checkpoint.tensors[name].dtype for name in low)
    found = [f"{len(ours):,} compressed-tensors tensors"] * bool(ours) + [f"{len(scales):,} .scale tensors"] * bool(
        scales
    )
    found += [f"weights in {dtype}: {count:,}" for dtype, count in counts.items()]
    if ours:
        what = "This source is a quantized artifact in compressed-tensors format, not a BF16 checkpoint"
        hint = "give the BF16 checkpoint that it was made from"
    else:
        what = "This source is the native FP8+MXFP4 release, not a BF16 checkpoint"
        if not scales:
            what = "This source has 8-bit weights, as the native FP8+MXFP4 release does: it is not a BF16 checkpoint"
        hint = "dequantize it to BF16 first; reading the native release comes in a later version"
    return [
        SourceError(
            what,
            where=diff.checkpoint.root,
            expected="BF16 weights without scales",
            found=f"{', '.join(found)} ({_few([*ours, *scales, *low])})",
            hint=hint,
        )
    ]


def _draft(diff: _Difference, dims: Dims) -> list[SourceError]:
    key = "num_nextn_predict_layers"
    names = [name for name in diff.checkpoint.tensors if name.startswith("mtp.")]
    hidden = [name for name in diff.checkpoint.unread if name.startswith("mtp.")]
    told = f"{key}: {diff.checkpoint.config.get(key, 'no such key')}"
    kind = draft_kind([*names, *hidden])
    if kind == "dspark":
        what, expected = "The draft under mtp. is a DSpark draft, not MTP", "mtp.N.enorm.weight and mtp.N.hnorm.weight"
        found = f"a Markov head: {_few([n for n in (*names, *hidden) if 'markov' in n])}"
        hint = "use the release with MTP; DSpark drafts are not supported"
    elif names and dims.mtp_layers == 0:
        what, expected = "The files have MTP tensors, but config.json has no MTP layer", f"{key} of at least 1"
        found = f"{told}; {len(names):,} mtp.* tensors: {_few(names)}"
        hint = f"restore {key} in config.json (DeepSeek-V4-Flash: 1), or remove the mtp.* tensors"
    elif dims.mtp_layers > 0 and kind == "none":
        count = sum(spec.is_mtp for spec in diff.specs.values())
        what, expected = "config.json has MTP, but the files have no mtp.* tensor", f"{count:,} mtp.* tensors ({told})"
        found, hint = "none", f"download a checkpoint with MTP, or set {key} to 0 to make an artifact without it"
    else:
        return []
    diff.explain(
        [n for part in (diff.missing, diff.extra, diff.dtype, diff.shape) for n in part if n.startswith("mtp.")]
    )
    return [SourceError(what, where=diff.checkpoint.root, expected=expected, found=found, hint=hint)]


def _missing_blocks(diff: _Difference) -> list[SourceError]:
    whole = diff.blocks(diff.specs)
    gone = {b: names for b, names in diff.blocks(diff.missing).items() if len(names) == len(whole[b]) > 1}
    diff.explain([name for names in gone.values() for name in names])
    return [
        SourceError(
            f"{block} is missing as a whole",
            where=diff.checkpoint.root,
            expected=f"{len(names):,} tensors: {_few(names)}",
            found="none of them",
            hint="download the checkpoint again, or correct the number of layers in config.json",
        )
        for block, names in gone.items()
    ]


def _missing_experts(diff: _Difference, dims: Dims) -> list[SourceError]:
    errors = []
    for block, names in diff.blocks(n for n, s in diff.missing.items() if s.role == Role.ROUTED_EXPERT).items():
        parts: dict[int | None, list[str]] = defaultdict(list)
        for name in names:
            parts[diff.specs[name].expert].append(name)
        gone = {e: part for e, part in parts.items() if e is not None and len(part) == 3}
        if not gone:
            continue
        lost = [name for part in gone.values() for name in part]
        diff.explain(lost)
        errors.append(
            SourceError(
                f"{len(gone):,} routed expert{'s' * (len(gone) != 1)} of {block} "
                f"{'is' if len(gone) == 1 else 'are'} missing: {_ranges(sorted(gone))}",
                where=diff.checkpoint.root,
                expected=f"{dims.experts:,} experts (n_routed_experts), numbered from 0",
                found=f"{dims.experts - len(gone):,}; {len(lost):,} tensors are missing: {_few(lost)}",
                hint="download the checkpoint again, or correct n_routed_experts in config.json",
            )
        )
    return errors


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: [3, 7, 8, 9] -> '3, 7-9'."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return _few([f"{a}" if a == b else f"{a}-{b}" for a, b in runs], most=12)


def _by_block(diff: _Difference, names: Iterable[str], kind: str, hint: str) -> list[SourceError]:
    """One error for the tensors of each block that are `kind`."""
    errors = []
    for block, group in diff.blocks(names).items():
        count = f"{len(group):,} tensors" if len(group) > 1 else "1 tensor"
        entry = diff.checkpoint.tensors.get(group[0])
        errors.append(
            SourceError(
                f"{count} of {block} {'is' if len(group) == 1 else 'are'} {kind}: {_few([_shown(n) for n in group])}",
                where=diff.checkpoint.root if entry is None else diff.checkpoint.root / entry.file,
                expected=_described(diff.specs.get(group[0])),
                found=_described(entry),
                hint=hint,
            )
        )
    return errors


def _described(tensor: TensorSpec | TensorEntry | None) -> str:
    return "no such tensor" if tensor is None else f"{_shown(tensor.name)} {tensor.dtype} {list(tensor.shape)}"
