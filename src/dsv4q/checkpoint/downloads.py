"""Downloads that are not done: what a tool leaves beside a file until it has all of it.

Several tools give a file its final name and size before they have its bytes, so neither header nor size tells. What
does: the tool's own remains beside it, and holes.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv4q.checkpoint.files import INDEX, POINTER_BYTES, opened, pointer_error, read_at
from dsv4q.checkpoint.headers import Findings, TensorEntry, few, shown
from dsv4q.errors import SourceError

_REMAINS = re.compile(
    r"""(.*[._-])? (?:
        aria2 (__temp)? | incomplete | part | partial | partial~ | crdownload | opdownload | download | tmp | temp |
        filepart | gstmp | st | ytdl | !ut | !qb | bc! | xltd | td
    )
    | \.[0-9a-f]{8}        # the AWS command line
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What follows a file's name in that of its unfinished download; `hf` and others put a digest between."""
_HIDDEN = re.compile(r"\.[A-Za-z0-9]{6}")
"""The same for hidden files, of rsync."""

_FOLDERS = {".cache/huggingface/download": "*.incomplete", "._____temp": "*"}
"""Where `hf download --local-dir` and ModelScope keep what is unfinished, within the folder."""

_CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Small files beside index and config.json that are not parsed here."""

_SPARSE_OK = ("embed.weight", "head.weight")
"""Tensors with rows that no token uses, which may be zeros and, in a sparse copy, holes."""

_TAIL = 4096


def check_downloads(files: Iterable[str], findings: Findings) -> None:
    """Find what unfinished downloads left beside these files and the small ones, and small ones that are pointers."""
    names = [*files, "config.json", INDEX, *_CARRIED]
    for name, remains in _unfinished(findings.root, names):
        findings.add(
            "A download is not finished",
            name,
            found=f"{shown(remains)} beside it",
            hint="run the download to its end; if it was finished otherwise, remove that file",
        )
    for folder, pattern in _FOLDERS.items():
        inside = (p for p in (findings.root / folder).rglob(pattern) if p.is_file())
        found = sorted(str(p.relative_to(findings.root)) for p in inside)
        if found:
            findings.add(
                "A download into this folder is not finished",
                "",
                found=few([shown(name) for name in found]),
                hint="run the same download to its end; if it was finished otherwise, remove these files",
            )
    for name in _CARRIED:
        _check_pointer(findings.root / name, findings)


def _unfinished(root: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name of a file, and of the remains beside it or beside what it is a link to."""
    listed: dict[str, list[str]] = {}
    for name in names:
        for path in dict.fromkeys((os.path.abspath(root / name), os.path.realpath(root / name))):
            folder, file = os.path.split(path)
            if folder not in listed:
                listed[folder] = _listed(folder)
            for entry in listed[folder]:
                rest = entry.removeprefix(file)
                hidden = entry.removeprefix(f".{file}")
                if (rest not in ("", entry) and _REMAINS.fullmatch(rest)) or (
                    hidden not in ("", entry) and (_HIDDEN.fullmatch(hidden) or _REMAINS.fullmatch(hidden))
                ):
                    yield name, entry


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []  # files in it may be readable all the same


def _check_pointer(path: Path, findings: Findings) -> None:
    try:
        with opened(path) as (handle, size):
            error = pointer_error(path, read_at(handle, 0, min(size, POINTER_BYTES), path))
    except SourceError:
        return  # absent, or whoever reads it says why it cannot be read
    if error is not None:
        findings.add_error(error)


@dataclass(frozen=True)
class Holes:
    """Data that the file system never got, and that would be read as zeros. Some file systems cannot tell.

    Attributes:
        problems: tensors that lack data.
        warnings: the same where it may be meant.
        everywhere: there is nothing but headers, in each shard.
    """

    problems: tuple[SourceError, ...] = ()
    warnings: tuple[SourceError, ...] = ()
    everywhere: SourceError | None = None


def find_holes(root: Path, tensors: Iterable[TensorEntry]) -> Holes:
    """The holes in these tensors of a checkpoint, and zeros at the end of a shard.

    Raises:
        SourceError: a shard cannot be opened.
    """
    findings, warnings = Findings(root), Findings(root)
    files: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in tensors:
        files[entry.file].append(entry)
    is_empty = []
    for file, entries in files.items():
        with opened(root / file) as (handle, size):
            begin = min(entry.start for entry in entries)
            holes = list(_holes(handle, begin, size))
            # the header's last block goes on into the data
            is_empty.append(any(a <= begin + os.fstat(handle).st_blksize and b == size for a, b in holes))
            last = max((entry for entry in entries if entry.nbytes), key=lambda entry: entry.start, default=None)
            if last is not None and last.name.endswith(".weight") and last.start + last.nbytes <= size and not holes:
                length = min(_TAIL, last.nbytes)
                if not read_at(handle, last.start + last.nbytes - length, length, root / file).strip(b"\0"):
                    (warnings if last.name.endswith(_SPARSE_OK) else findings).add(
                        "A shard ends in zeros",
                        file,
                        tensor=last.name,
                        found=f"its last {length:,} bytes are zeros",
                        hint="a stopped download leaves zeros: get this file again, or check its SHA-256",
                    )
        lacking = {e: missing for e in entries if (missing := sum(_common(e, hole) for hole in holes))}
        for entry, missing in lacking.items():
            may_be = entry.name.endswith(_SPARSE_OK) and missing < entry.nbytes
            (warnings if may_be else findings).add(
                "A tensor has a hole where its data should be",
                file,
                tensor=entry.name,
                expected="data, of a download that was not stopped",
                found=f"{missing:,} of its {entry.nbytes:,} bytes were never written",
                hint="download this file again; if it is whole, and a sparse copy, `cp --sparse=never` fills the holes",
            )
    if not is_empty or not all(is_empty):
        return Holes(findings.errors(), warnings.errors())
    everywhere = SourceError(
        "The shards have headers, but no data",
        where=root,
        found="files whose data was never written",
        hint="`dsv4q plan` works from headers alone; `dsv4q quantize` needs the weights",
    )
    return Holes(warnings=(everywhere,), everywhere=everywhere)


def _holes(handle: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Holes between two offsets of a file, as begin and end."""
    at = begin
    try:
        while (hole := os.lseek(handle, at, os.SEEK_HOLE)) < end:
            try:
                at = os.lseek(handle, hole, os.SEEK_DATA)
            except OSError:  # there is no data up to the end of the file
                at = end
            yield hole, min(at, end)
            if at >= end:
                return
    except OSError:
        return  # this file system cannot be asked


def _common(entry: TensorEntry, hole: tuple[int, int]) -> int:
    return max(0, min(entry.start + entry.nbytes, hole[1]) - max(entry.start, hole[0]))
