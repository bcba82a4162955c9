"""What a checkpoint's folder says of itself: config.json, the index, and which files are its shards.

The index is model.safetensors.index.json: `weight_map`, tensor name -> file, and `metadata.total_size` in bytes.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.files import AGAIN, INDEX, opened, pointer_error, read_at
from dsv4q.checkpoint.headers import Findings, Shard, few, shown, strict_json
from dsv4q.errors import SourceError

MAX_INDEX = 256 << 20

_SERIES = re.compile(r"(?P<prefix>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_LOCAL_PATH = re.compile(r"(/|~|file:|\.\.?/|[A-Za-z]:[\\/]).*", re.DOTALL)

_ONE_REVISION = "download index and shards again, of one revision"

MAX_CONFIG = 16 << 20
"""Longest config.json that is read, in bytes."""


def _instead(path: Path) -> str:
    """What to give in place of a path without a config.json."""
    snapshots = sorted(path.glob("snapshots/*/config.json"))
    if snapshots:
        inside = few([str(snapshot.parent) for snapshot in snapshots])
        return f"this is a folder of the Hugging Face cache; give a snapshot in it: {inside}"
    if not path.exists() and _HUB_ID.fullmatch(str(path)):
        return f"`hf download {path} --local-dir FOLDER` downloads a checkpoint; then give FOLDER"
    return "give a checkpoint folder, or a folder or file with just a config.json"


def load_model_config(path: Path) -> dict[str, Any]:
    """Parse a config.json (`path` is the file or the folder that holds it).

    Raises:
        SourceError: absent, unreadable, too large, not JSON, not an object.
    """
    try:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise SourceError(
                "There is no config.json here",
                where=file,
                hint=_instead(path),
            )
        size = file.stat().st_size
        if size > MAX_CONFIG:
            raise SourceError(
                "This is too large to be a config.json",
                where=file,
                expected=f"at most {MAX_CONFIG:,} bytes",
                found=f"{size:,} bytes",
                hint="give the checkpoint folder, not one of its shards",
            )
        raw = file.read_bytes()
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise SourceError("config.json cannot be read", where=path, found=error) from error
    if (pointer := pointer_error(file, raw)) is not None:
        raise pointer
    try:
        config = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # an integer of more than 4,300 digits is a plain ValueError
        raise SourceError("config.json is not valid JSON", where=file, found=error) from error
    if not isinstance(config, dict):
        raise SourceError("config.json is not a JSON object", where=file, found=type(config).__name__)
    return config


def texts_in(value: object) -> Iterator[str]:
    """Every string in a value of config.json, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts_in(one)


def has_local_path(value: object) -> bool:
    """Whether a value of config.json has a path that only somebody's machine knows."""
    return any(_LOCAL_PATH.fullmatch(text) for text in texts_in(value))


@dataclass(frozen=True)
class Index:
    weight_map: dict[str, str]
    total_size: object | None


def read_index(findings: Findings) -> Index | None:
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
    return Index({n: f for n, f in weight_map.items() if isinstance(f, str)}, total)


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


def usable_files(files: Iterable[str], findings: Findings, named_in: str) -> list[str]:
    """Those of `files` that stay inside the folder; the others become problems.

    What the index names must. A file or folder there may be a link to anywhere: who put it there wants it followed,
    and the Hugging Face cache consists of such links.
    """
    usable = []
    for file in files:
        reason = _bad_file_name(file)
        if reason is None:
            usable.append(file)
        else:
            findings.add(
                "A shard's file name is refused",
                named_in,
                expected="the name of a .safetensors file inside the checkpoint folder",
                found=f"{shown(file)}: {reason}",
                hint="correct the index, or download the checkpoint again",
            )
    return usable


def folder_files(root: Path) -> list[str]:
    """Names of the safetensors files that lie in the folder, whatever they are; hidden ones are not a checkpoint's."""
    try:
        return sorted(n for n in os.listdir(root) if n.endswith(".safetensors") and not n.startswith("."))
    except OSError as error:
        raise SourceError("The checkpoint folder cannot be read", where=root, found=error) from error


def check_lone_files(files: Sequence[str], findings: Findings) -> None:
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


def check_strays(on_disk: Sequence[str], named: Collection[str], findings: Findings) -> None:
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


def promise(count: int) -> str | None:
    """What should be in a shard in which the index puts `count` tensors."""
    return f"a shard with {count:,} tensor{'s' * (count != 1)}, as {INDEX} says" if count else None


def is_readable(shards: dict[str, Shard], file: str) -> bool:
    return file in shards and shards[file].readable


def check_places(index: Index | None, shards: dict[str, Shard], findings: Findings, warnings: Findings) -> None:
    """Each tensor lies in one shard, and index and headers say the same: no name more, no name fewer.

    A wrong `metadata.total_size` goes into the warnings, for nothing depends on it.
    """
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
        if file not in holders[name] and is_readable(shards, file):
            found = f"in {few([shown(f) for f in holders[name]])}" if holders[name] else "in no shard"
            findings.add("The index puts a tensor where it is not", file, tensor=name, expected="here", found=found)
    _check_total(index, shards, warnings)


def _check_total(index: Index, shards: dict[str, Shard], warnings: Findings) -> None:
    whole = all(is_readable(shards, file) and not shards[file].unusable for file in set(index.weight_map.values()))
    total = sum(entry.nbytes for shard in shards.values() for entry in shard.entries.values())
    # Old transformers releases wrote the number as a float, so numbers are compared, not types.
    if index.total_size is not None and whole and (isinstance(index.total_size, bool) or index.total_size != total):
        warnings.add(
            "The index's total_size is not the size of the tensors",
            f"{INDEX}: metadata.total_size",
            expected=f"{total:,} bytes",
            found=shown(repr(index.total_size)),
            hint="nothing depends on it; tools that add or rename tensors often leave the old number",
        )
