"""Files and folders: opened with care, read and written whole, made durable; every system error names its file."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from dsv4q.errors import DiskError, SourceError

WORK = ".dsv4q"
"""Work folder of an unfinished run, inside its output folder."""
INDEX = "model.safetensors.index.json"
REPORT = "report.json"
PAGE = "report.html"

_UNSUPPORTED = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOTTY,
}  # fmt: skip
"""What file systems say to a call that they do not have."""

BUFFERS = 256
"""At most so many in one call of preadv or pwritev; the system takes 1024."""

AGAIN = "download this file again"
_LFS = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024
"""Longest Git LFS pointer, as its specification has it: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
GOES_ON = "make room, or see to the disk; then the same command goes on from there"


# ------------------------------------------------------------------------------------------------ reading


def open_regular(path: Path, expected: str | None = None) -> tuple[int, int]:
    """Open a regular file for reading; returns descriptor and size. O_NONBLOCK so that a FIFO cannot hang us.

    Raises:
        SourceError: absent, not to be opened, or no regular file; `expected` says what should have been there.
    """

    def refused(what: str, found: object) -> SourceError:
        return SourceError(what, where=path, expected=expected, found=found, hint=AGAIN)

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


@contextmanager
def opened(path: Path, expected: str | None = None) -> Iterator[tuple[int, int]]:
    """`open_regular`, closed at the end."""
    handle, size = open_regular(path, expected)
    try:
        yield handle, size
    finally:
        os.close(handle)


def fill(handle: int, buffers: Sequence[memoryview], offset: int, where: Path) -> int:
    """Read into `buffers` (bytes), one after the other, from `offset` until all are full or the file ends.

    Returns:
        The bytes read.

    Raises:
        SourceError: the disk fails.
    """
    done, left = 0, deque(buffer for buffer in buffers if buffer)
    try:
        while left:
            count = os.preadv(handle, list(islice(left, BUFFERS)), offset + done)
            if count == 0:
                break
            done += count
            _pass(left, count)
    except OSError as error:
        raise SourceError("Reading the checkpoint failed", where=where, found=error, hint="check the disk") from error
    return done


def read_at(handle: int, offset: int, length: int, where: Path) -> bytes:
    """Up to `length` bytes; fewer only where the file ends. Raises as `fill`."""
    buffer = bytearray(length)
    return bytes(memoryview(buffer)[: fill(handle, [memoryview(buffer)], offset, where)])


def pointer_error(path: Path, raw: bytes) -> SourceError | None:
    """The refusal of a file that begins with `raw`, if it is a Git LFS pointer: a text of three lines in its place."""
    if not raw.startswith(_LFS):
        return None
    return SourceError(
        "This is a Git LFS pointer, not the file that it stands for",
        where=path,
        found="; ".join(raw[:POINTER_BYTES].decode("ascii", "backslashreplace").splitlines()),
        hint="`git lfs install && git lfs pull` in this folder gets the files, as `hf download` does",
    )


# ------------------------------------------------------------------------------------------------ writing


@contextmanager
def disk_errors(what: str, where: Path) -> Iterator[None]:
    """Turn what the system says of a file into a DiskError that names it."""
    try:
        yield
    except OSError as error:
        raise DiskError(what, where=where, found=error.strerror, hint=GOES_ON) from error


def write_at(handle: int, views: Iterable[memoryview], offset: int) -> None:
    """pwritev may write less than it was given, on a disk that is nearly full for one."""
    left = deque(view for view in views if view)
    while left:
        written = os.pwritev(handle, left, offset)
        offset += written
        _pass(left, written)


def _pass(left: deque[memoryview], count: int) -> None:
    """Take so many bytes off what is left."""
    while left and count >= len(left[0]):
        count -= len(left.popleft())
    if count:
        left[0] = left[0][count:]


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give what the system says of an open file the name of that file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _unless_unsupported(call: Callable[[], None]) -> str | None:
    """Do what the file system may not have; what it says if it has not.

    Raises:
        OSError: it has, and failed.
    """
    try:
        call()
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return error.strerror
    return None


def fsync(handle: int) -> None:
    """Wait until the disk has what was written to a file, or go on where the file system cannot tell."""
    _unless_unsupported(lambda: os.fsync(handle))


def make_readable(handle: int) -> None:
    """Give an open file the mode 0644, whatever the umask; mounted buckets have a mode for all, and keep it."""
    _unless_unsupported(lambda: os.fchmod(handle, 0o644))


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut, where the file system can do that."""
    with named(folder):
        _unless_unsupported(lambda: _fsync_folder(folder))


def shortcomings(folder: Path, handle: int) -> list[str]:
    """What the file system of `folder` lacks, for people; tried out on it and on an open file in it.

    Raises:
        OSError: it has something, and failed.
    """
    again = "after a power cut start over with --no-resume"
    tried: dict[str, Callable[[], None]] = {
        f"cannot make renames durable; {again}": lambda: _fsync_folder(folder),
        f"cannot make files durable; {again}": lambda: os.fsync(handle),
        "has file modes of its own": lambda: os.fchmod(handle, 0o644),
    }
    with named(folder):
        found = {what: _unless_unsupported(call) for what, call in tried.items()}
    return [f"{folder.parent}: this file system {what} ({said})" for what, said in found.items() if said is not None]


def utf8(text: str) -> bytes:
    """A text as UTF-8. What of a path is no UTF-8 becomes its escape, which in JSON is that very string."""
    return text.encode("utf-8", "backslashreplace")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that it is either whole or not there; a text as `utf8` has it; mode 0644."""
    if isinstance(data, str):
        data = utf8(data)
    partial = path.with_name(path.name + ".partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        with named(path):
            try:
                make_readable(handle)
                write_durably(handle, data)
            finally:
                os.close(handle)
            os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_durably(handle: int, data: bytes) -> None:
    """Append all of `data` and wait until the disk has it."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    fsync(handle)


def is_finished(out: Path) -> bool:
    """Whether `out` holds an artifact that a run of ours completed."""
    return (out / INDEX).is_file() and (out / REPORT).is_file()
