"""Which checkpoint this is, so that anybody can get the same: its revision, where one can be told, and digests.

A revision is that of the Hugging Face cache (the folder's own name), of `hf download --local-dir` (kept beside the
files), or of a git clone.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from dsv4q.checkpoint.files import INDEX
from dsv4q.checkpoint.source import Checkpoint

_SNAPSHOT = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pin:
    """A checkpoint, told from every other."""

    repository: str | None
    """On the Hugging Face hub; None where the folder does not say."""
    revision: str | None
    """Commit; None where the folder does not say."""
    config_sha256: str
    """Of config.json, the bytes of the file."""
    index_sha256: str | None
    """Of the index; None if there is none."""
    tensors_sha256: str | None
    """Over `name dtype shape` lines of the tensors in the files, sorted by name; None without weights."""

    def as_dict(self) -> dict[str, str | None]:
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        name = " at revision ".join(filter(None, (self.repository, self.revision))) or "revision unknown"
        digests = {"config.json": self.config_sha256, "index": self.index_sha256, "tensors": self.tensors_sha256}
        return "; ".join([name, *(f"{what} sha256 {digest}" for what, digest in digests.items() if digest)])


def pin_of(checkpoint: Checkpoint) -> Pin:
    """Read config.json and index once more, no tensor. Names are those in the files, of a native checkpoint too."""
    tensors = checkpoint.on_disk_tensors
    lines = "".join(f"{e.name} {e.dtype} {list(e.shape)}\n" for e in sorted(tensors.values(), key=lambda e: e.name))
    repository, revision = _origin(checkpoint.root)
    return Pin(
        repository,
        revision,
        hashlib.sha256(checkpoint.config_file.read_bytes()).hexdigest(),
        _digest(checkpoint.root / INDEX),
        hashlib.sha256(lines.encode()).hexdigest() if checkpoint.files else None,
    )


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _origin(root: Path) -> tuple[str | None, str | None]:
    for path in (os.path.abspath(root), os.path.realpath(root)):
        match = _SNAPSHOT.fullmatch(path)
        if match:
            return f"{match['owner']}/{match['name']}", match["revision"]
    beside = _line(root / ".cache" / "huggingface" / "download" / "config.json.metadata")
    if _COMMIT.fullmatch(beside):
        return None, beside
    head = _line(root / ".git" / "HEAD")
    if head.startswith("ref: "):
        head = _line(root / ".git" / head.removeprefix("ref: "))
    return None, head if _COMMIT.fullmatch(head) else None


def _line(path: Path) -> str:
    """First line of a small file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, ValueError):
        return ""
