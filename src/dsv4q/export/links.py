"""Whole files of the source taken over as shards: a reflink or a hard link where the file system has them, else a copy.

A file is put together in OUT's work folder and renamed when it is whole, so a shard that has its name is finished.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

from dsv4q.checkpoint.files import WORK, disk_errors, fsync_folder

REFLINK, HARD_LINK, COPY = "reflink", "hard link", "copy"

_FICLONE = 0x40049409
"""ioctl of Linux (`linux/fs.h`) that makes one file share another one's blocks until either is written to."""


def take_over(source: Path, out: Path, name: str) -> str:
    """Make `out/name` the same bytes as `source`; says how.

    Raises:
        DiskError: the disk refuses.
    """
    target, partial = out / name, out / WORK / name
    with disk_errors("Taking over a file of the source failed", target):
        partial.unlink(missing_ok=True)
        how = _made(source.resolve(), partial)
        os.replace(partial, target)
        fsync_folder(out)
    return how


def needs_no_room(source: Path, out: Path) -> bool:
    """Whether the files of `source` can be hard links in `out`, as far as their devices tell."""
    there = out.absolute()
    while not there.exists():
        there = there.parent
    return source.stat().st_dev == there.stat().st_dev


def _made(source: Path, partial: Path) -> str:
    if _is_cloned(source, partial):
        return REFLINK
    # A hard link has the source's mode, and an artifact may be read by everybody.
    if stat.S_IMODE(source.stat().st_mode) & 0o444 == 0o444:
        try:
            os.link(source, partial)
            return HARD_LINK
        except OSError:
            pass  # another file system, or one without links
    with source.open("rb") as theirs, partial.open("wb") as ours:
        shutil.copyfileobj(theirs, ours, 16 << 20)
        os.fchmod(ours.fileno(), 0o644)
        ours.flush()
        os.fsync(ours.fileno())
    return COPY


def _is_cloned(source: Path, partial: Path) -> bool:
    with source.open("rb") as theirs, partial.open("wb") as ours:
        try:
            fcntl.ioctl(ours.fileno(), _FICLONE, theirs.fileno())
        except OSError:
            is_cloned = False  # not on this file system, or not between these two
        else:
            os.fchmod(ours.fileno(), 0o644)
            os.fsync(ours.fileno())
            return True
    partial.unlink()
    return is_cloned
