"""What an unfinished run knows about itself: who it is, which blocks are done, that nobody else is at it.

All of it lives in `OUT/.dsv4q/`, which disappears when the artifact is finished:

    lock            held while a run is alive (see lock.py)
    journal.jsonl   first line the identity, then one line per finished block, each fsynced
    streams.*       residual streams behind the last finished block (see run/block.py)

A line is the last thing written for a block, after its tensors are on disk, so a block with a line is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.files import (
    INDEX,
    WORK,
    fsync_folder,
    is_finished,
    named,
    shortcomings,
    utf8,
    write_atomic,
    write_durably,
)
from dsv4q.checkpoint.lock import LOCK_FILES, OutputLock
from dsv4q.errors import OutputError, ResumeError


class Journal:
    """The journal of one output folder, open and locked.

    Raises (from `open`):
        OutputError: another run is at work in the same folder, or has finished there since the caller looked.
        ResumeError: the journal there is of another source, config, data or version, or damaged.
    """

    def __init__(self, folder: Path, lock: OutputLock | None) -> None:
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        """Finished block -> its record."""
        self.warnings: list[str] = []
        """What the file system lacks, for people."""
        self._lock = lock

    @classmethod
    def open(cls, out: Path, identity: Mapping[str, Any], *, resume: bool) -> Journal:
        """Lock `out` and read what is done; with `resume=False` forget it."""
        folder = out / WORK
        folder.mkdir(parents=True, exist_ok=True)
        lock = OutputLock.take(folder)
        journal = cls(folder, lock)
        try:
            journal.warnings = [*filter(None, [lock.warning]), *shortcomings(folder, lock.handle)]
            if is_finished(out):
                raise OutputError(
                    "Another run has just finished the artifact in this folder",
                    where=out,
                    hint="nothing was touched; the same command says whether that artifact is the one wanted",
                )
            journal._load(dict(identity), resume)
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def follow(cls, out: Path, done: Mapping[str, dict[str, Any]]) -> Journal:
        """The journal as another rank sees it that rank 0 keeps: what is done, and nothing to write or lock."""
        journal = cls(out / WORK, None)
        journal.done = dict(done)
        return journal

    @staticmethod
    def identity_of(out: Path) -> dict[str, Any] | None:
        """Identity of the unfinished run in `out`, if there is one."""
        file = out / WORK / "journal.jsonl"
        lines = _whole_lines(file) if file.is_file() else []
        return lines[0] if lines else None

    @property
    def _file(self) -> Path:
        return self.folder / "journal.jsonl"

    def _load(self, identity: dict[str, Any], resume: bool) -> None:
        lines = _whole_lines(self._file) if resume and self._file.is_file() else []
        if not lines:
            self._start(identity)
            return
        difference = first_difference(lines[0], identity)
        if difference:
            key, before, now = difference
            raise ResumeError(
                f"The unfinished run in this folder was started with another {key.partition('.')[0]}",
                where=f"{self.folder.parent}: {key}",
                expected=before,
                found=now,
                hint="run it as it was started, or start over with --no-resume",
            )
        self.done = {record["block"]: record for record in lines[1:]}
        # Cut a torn last line off, or the next one would be glued to it.
        write_atomic(self._file, b"".join(_line(record) for record in lines))

    def _start(self, identity: dict[str, Any]) -> None:
        """Begin anew: drop what an earlier run left, its journal first so that a crash here loses nothing."""
        self._file.unlink(missing_ok=True)
        (self.folder.parent / INDEX).unlink(missing_ok=True)
        for leftover in [*self.folder.glob("streams.*"), *self.folder.parent.glob("model-*.safetensors*")]:
            leftover.unlink()
        write_atomic(self._file, _line(identity))

    def finish_block(self, block: str, record: Mapping[str, Any]) -> None:
        """Record that `block` is on disk; its tensors must have been fsynced before."""
        entry = {"block": block, **record}
        with named(self._file):
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND)
            try:
                write_durably(handle, _line(entry))
            finally:
                os.close(handle)
        self.done[block] = entry

    def remove(self) -> None:
        """Delete the work folder: the artifact is complete."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name not in LOCK_FILES:
                path.unlink()
        for path in sorted((p for p in self.folder.rglob("*") if p.is_dir()), reverse=True):
            path.rmdir()
        if self._lock is not None:
            self._lock.remove()
        fsync_folder(self.folder.parent)

    @classmethod
    def remove_leftovers(cls, out: Path) -> None:
        """Delete the work folder of a finished artifact, if a crash left it."""
        folder = out / WORK
        if folder.is_dir():
            journal = cls(folder, OutputLock.take(folder))
            try:
                journal.remove()
            finally:
                journal.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _line(record: Mapping[str, Any]) -> bytes:
    return utf8(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Lines that were written whole; a crash can only tear the last one.

    Raises:
        ResumeError: a line that no run of ours wrote.
    """
    *lines, _torn = path.read_bytes().split(b"\n")
    try:
        records = [json.loads(line) for line in lines]
    except ValueError:
        records = [None]
    if not all(isinstance(r, dict) and ("block" in r or i == 0) for i, r in enumerate(records)):
        raise ResumeError(
            "The journal of the unfinished run is damaged",
            where=path,
            expected="one JSON object in each line, as dsv4q writes them",
            hint="start over with --no-resume",
        )
    return records


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    """First place where two JSON values differ: dotted key, both values; None when they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            found = first_difference(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    # Through JSON, so that a tuple equals the list that it became in the file.
    if json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True):
        return None
    return key, json.dumps(before, ensure_ascii=False)[:200], json.dumps(now, ensure_ascii=False)[:200]
