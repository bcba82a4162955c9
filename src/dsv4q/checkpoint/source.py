"""A checkpoint as it lies on disk: headers first, bytes on demand, every problem named.

The index of several shards is `model.safetensors.index.json`: `weight_map` (tensor -> file) and `metadata.total_size`
(bytes of data). Index and headers must agree exactly; a file name that leads out of the folder is never followed.
"""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.headers import (
    AGAIN,
    MAX_HEADER,
    Findings,
    Shard,
    TensorEntry,
    few,
    fill,
    open_regular,
    opened,
    read_at,
    read_shard,
    shown,
    strict_json,
)
from dsv4q.errors import SourceError
from dsv4q.layout import DTYPE_BYTES, load_config

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
MAX_INDEX = 256 << 20
SAMPLES, SAMPLE_BYTES = 16, 4096

_SERIES = re.compile(r"(?P<prefix>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_ONE_REVISION = "download index and shards again, of one revision"


# ------------------------------------------------------------------------------------------------ checkpoint


class _Handles:
    """Open files of one checkpoint, shared by reading threads (preadv has no file position to share)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}

    def get(self, path: Path, size: int) -> int:
        with self._lock:
            if path not in self._open:
                handle, now = open_regular(path)
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
    hidden: Mapping[str, str] = field(default_factory=dict)
    """Tensors that index or headers promise, of which a problem hides dtype and shape -> the shard they are said to be
    in."""
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
        if entry.nbytes:
            self.read_part(name, 0, buffer.cast("B"))

    def read_part(self, name: str, start: int, buffer: memoryview) -> None:
        """Read those raw bytes of a tensor into `buffer` (bytes) that begin at byte `start` of it.

        Raises:
            SourceError: as `read`.
        """
        if not len(buffer):
            return
        entry = self._entry(name)
        path = self.root / entry.file
        handle = self._handles.get(path, self.files[entry.file])
        count = fill(handle, buffer, entry.start + start, path)
        if count != len(buffer):
            raise SourceError(
                "A shard ends inside a tensor",
                where=f"{path}: {shown(name)}",
                expected=f"{len(buffer):,} bytes from offset {entry.start + start:,}",
                found=f"{count:,} bytes",
                hint=AGAIN,
            )

    def copy_to(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor's values into `tensor`, of its dtype and shape, on any device.

        Raises:
            SourceError: as `tensor`.
        """
        tensor.copy_(self.tensor(name))

    def is_whole(self, name: str) -> bool:
        """Whether a tensor's bytes are as many as dtype and shape need, and its file is long enough to hold them."""
        entry = self._entry(name)
        needed = math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
        return entry.nbytes == needed and entry.start + entry.nbytes <= self.files[entry.file]

    @cached_property
    def unread(self) -> frozenset[str]:
        """Tensors that are neither there nor missing: the names in `hidden`."""
        return frozenset(self.hidden)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor with its dtype and shape, on the CPU, in memory of its own.

        Raises:
            SourceError: as `read`; a dtype that torch lacks; a size that is not that of dtype and shape.
        """
        import torch

        entry = self._entry(name)
        dtype = getattr(torch, TORCH_NAMES.get(entry.dtype, ""), None)
        if dtype is None or math.prod(entry.shape) * DTYPE_BYTES[entry.dtype] != entry.nbytes:
            raise SourceError(
                "A tensor cannot be made of these bytes",
                where=f"{self.root / entry.file}: {shown(name)}",
                found=f"{entry.nbytes:,} bytes as {shown(entry.dtype)} {list(entry.shape)}",
                hint=AGAIN,
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
            header = min(8 + int.from_bytes(read_at(handle, 0, 8, path), "little"), size, 8 + MAX_HEADER)
            samples = hashlib.sha256()
            for offset, length in _sample_extents(header, size):
                samples.update(read_at(handle, offset, length, path))
            shards[file] = {
                "size": size,
                "header_sha256": hashlib.sha256(read_at(handle, 0, header, path)).hexdigest(),
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
            raise SourceError("The checkpoint has no such tensor", where=f"{self.root}: {shown(name)}")
        return self.tensors[name]


TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""safetensors' names of dtypes -> torch's. By name, for torch is not imported here."""


def _sample_extents(begin: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of the samples of the bytes begin..end; all of them where there are few."""
    if end - begin <= SAMPLES * SAMPLE_BYTES:
        return [(begin, end - begin)]
    room = end - begin - SAMPLE_BYTES
    return [(begin + room * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


# ------------------------------------------------------------------------------------------------ index


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    total_size: object | None


def _read_index(findings: Findings) -> _Index | None:
    """The index, less what is unusable in it; None when it is absent or useless."""
    path = findings.root / INDEX
    if not os.path.lexists(path):
        return None
    try:
        with opened(path) as (handle, size):
            raw = read_at(handle, 0, min(size, MAX_INDEX + 1), path)
        if len(raw) > MAX_INDEX:
            found, most = f"{size:,} bytes", f"at most {MAX_INDEX:,} bytes"
            raise SourceError("The index is too large to be one", where=path, expected=most, found=found, hint=AGAIN)
        value = strict_json(raw, "The index", INDEX, findings)
    except SourceError as error:
        findings.add_error(error)
        return None
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(weight_map, dict) or not weight_map:
        found = "no such key" if weight_map is None else shown(repr(weight_map))
        findings.add("The index has no weight_map", INDEX, expected="an object: tensor name -> file name", found=found)
        return None
    for name, file in weight_map.items():
        if not isinstance(file, str):
            what = "The index gives no file name for a tensor"
            findings.add(what, INDEX, tensor=name, expected="a string", found=shown(repr(file)))
    metadata = value.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _Index({n: f for n, f in weight_map.items() if isinstance(f, str)}, total)


def _bad_file_name(file: str) -> str | None:
    """Why this file name cannot be followed, or None."""
    reasons = {
        "it has a backslash, NUL or another unprintable character": not file.isprintable() or "\\" in file,
        "it is an absolute path": file.startswith("/"),
        "it climbs out of the folder": ".." in file.split("/"),
        "it is not a .safetensors file": not file.endswith(".safetensors"),
        "it is not in its plain form": posixpath.normpath(file) != file,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _usable_files(files: Iterable[str], findings: Findings, named_in: str) -> list[str]:
    """Those of `files` that stay inside the folder; the others become problems."""
    usable, links = [], []
    real_root = os.path.realpath(findings.root)
    for file in files:
        reason = _bad_file_name(file)
        if reason is not None:
            findings.add(
                "A shard's file name is refused",
                named_in,
                expected="the name of a .safetensors file inside the checkpoint folder",
                found=f"{shown(file)}: {reason}",
                hint="correct the index, or download the checkpoint again",
            )
            continue
        real = os.path.realpath(findings.root / file)
        if os.path.commonpath([real_root, real]) == real_root:
            usable.append(file)
        else:
            links.append(f"{shown(file)} -> {shown(real)}")
    if links:
        lead = "A symbolic link leads" if len(links) == 1 else f"{len(links)} symbolic links lead"
        findings.add(
            f"{lead} out of the checkpoint folder",
            "",
            expected="shards inside the folder",
            found=few(links),
            hint="make real files of them: `cp -rL FOLDER NEW_FOLDER`, or `hf download … --local-dir NEW_FOLDER`",
        )
    return usable


def _folder_files(root: Path) -> list[str]:
    """Names of the safetensors files that lie in the folder, whatever they are; hidden ones are not a checkpoint's."""
    try:
        return sorted(n for n in os.listdir(root) if n.endswith(".safetensors") and not n.startswith("."))
    except OSError as error:
        raise SourceError("The checkpoint folder cannot be read", where=root, found=error) from error


def _check_lone_files(files: Sequence[str], findings: Findings) -> None:
    """Without an index, only a single shard that is not one of a series is a whole checkpoint."""
    series = _SERIES.fullmatch(files[0])
    if len(files) > 1 or (series is not None and int(series["total"][:9]) > 1):
        findings.add(
            "The index is missing",
            INDEX,
            expected=f"{INDEX} beside {len(files)} shard{'s' if len(files) > 1 else ' of a series'}",
            found=few([shown(f) for f in files]),
            hint="download the index; without it nobody can tell whether a shard is missing",
        )


def _check_strays(on_disk: Sequence[str], named: Collection[str], findings: Findings) -> None:
    """A shard of the index's own series that the index does not name: index and shards are of two downloads."""
    series = {(m["prefix"], m["total"]) for m in map(_SERIES.fullmatch, named) if m}
    for file in on_disk:
        match = _SERIES.fullmatch(file)
        if file not in named and match and (match["prefix"], match["total"]) in series:
            findings.add(
                "A shard of the series is not named by the index",
                file,
                expected=f"every {match['prefix']}-*-of-{match['total']}.safetensors in {INDEX}",
                hint="download the index again, or remove the file if it is a leftover",
            )


# ------------------------------------------------------------------------------------------------ scan


def scan(path: Path) -> Checkpoint:
    """Read config.json, index and every header; no tensor data.

    Args:
        path: checkpoint folder, or a folder or file with just a config.json.

    Raises:
        SourceError: config.json absent or unreadable. Every other problem goes into `Checkpoint.problems`.
    """
    config = load_config(path)
    if not path.is_dir():
        return Checkpoint(path.parent, config, {}, {}, (), has_weights=False, config_file=path)
    findings = Findings(path)
    index = _read_index(findings)
    has_index, on_disk = os.path.lexists(path / INDEX), _folder_files(path)
    weight_map = {} if index is None else index.weight_map
    promised = Counter(weight_map.values())
    files = _usable_files(on_disk if index is None else promised, findings, "" if index is None else INDEX)
    if index is not None:
        _check_strays(on_disk, promised, findings)
    elif on_disk and not has_index:
        _check_lone_files(on_disk, findings)
    read = [read_shard(file, _promise(promised[file]), findings) for file in sorted(files)]
    shards = {shard.file: shard for shard in read if shard is not None}
    _check_places(index, shards, findings)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards.values():  # of a tensor in two shards, the one that the index means; else the first
        tensors |= {n: e for n, e in shard.entries.items() if n not in tensors or weight_map.get(n) == shard.file}
    hidden = {n: shard.file for shard in shards.values() for n in shard.unusable}
    hidden |= {n: file for n, file in weight_map.items() if not _is_readable(shards, file)}
    return Checkpoint(
        path,
        config,
        tensors,
        {shard.file: shard.size for shard in shards.values()},
        findings.errors(),
        has_weights=bool(on_disk) or has_index,
        config_file=path / "config.json",
        hidden={n: file for n, file in hidden.items() if n not in tensors},
    )


def _promise(count: int) -> str | None:
    """What should be in a shard in which the index puts `count` tensors."""
    return f"a shard with {count:,} tensor{'s' * (count != 1)}, as {INDEX} says" if count else None


def _is_readable(shards: dict[str, Shard], file: str) -> bool:
    return file in shards and shards[file].readable


def _check_places(index: _Index | None, shards: dict[str, Shard], findings: Findings) -> None:
    """Each tensor lies in one shard, and index and headers say the same: no name more, no name fewer."""
    holders: dict[str, list[str]] = defaultdict(list)
    for shard in shards.values():
        for name in (*shard.entries, *shard.unusable):
            holders[name].append(shard.file)
    for name, files in holders.items():
        for file in files[1:]:
            found = f"also in {shown(files[0])}"
            what = "A tensor lies in two shards"
            findings.add(what, file, tensor=name, expected="one", found=found, hint=_ONE_REVISION)
        if index is not None and name not in index.weight_map:
            what = "A shard has a tensor that the index does not name"
            findings.add(what, files[0], tensor=name, hint=_ONE_REVISION)
    if index is None:
        return
    for name, file in index.weight_map.items():
        if file not in holders[name] and _is_readable(shards, file):
            found = f"in {few([shown(f) for f in holders[name]])}" if holders[name] else "in no shard"
            findings.add("The index puts a tensor where it is not", file, tensor=name, expected="here", found=found)
    _check_total(index, shards, findings)


def _check_total(index: _Index, shards: dict[str, Shard], findings: Findings) -> None:
    whole = all(_is_readable(shards, file) and not shards[file].unusable for file in set(index.weight_map.values()))
    total = sum(entry.nbytes for shard in shards.values() for entry in shard.entries.values())
    # Old transformers releases wrote the number as a float, so numbers are compared, not types.
    if index.total_size is not None and whole and (isinstance(index.total_size, bool) or index.total_size != total):
        findings.add(
            "The index's total_size is not the size of the tensors",
            f"{INDEX}: metadata.total_size",
            expected=f"{total:,} bytes",
            found=shown(repr(index.total_size)),
            hint=_ONE_REVISION,
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """`scan`, then refuse a checkpoint that has any problem.

    Raises:
        SourceError: the first problem; its hint tells how many more there are.
    """
    return require_sound(scan(path), path)


def require_sound(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint, which was found at `path`, if it has no problem.

    Raises:
        SourceError: the first problem; its hint tells how many more there are.
    """
    if not checkpoint.problems:
        return checkpoint
    first, more = checkpoint.problems[0], len(checkpoint.problems) - 1
    also = f"there {'is' if more == 1 else 'are'} {more} more problem{'s' * (more != 1)}: `dsv4q plan {path}` shows all"
    hints = [hint for hint in (first.hint, also if more else None) if hint]
    raise SourceError(
        first.what, where=first.where, expected=first.expected, found=first.found, hint="; ".join(hints) or None
    )
