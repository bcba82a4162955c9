"""Who works in an output folder: one run at a time, also where the file system has no locks.

`flock` is freed by the kernel when a process dies, whatever kills it. Lustre without its option, some NFS and mounted
buckets have none. There a file with the owner's name is made with O_EXCL, which is atomic everywhere; a run that is
killed leaves it behind, so it says of which process it is, and one of this machine that is gone counts no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path

from dsv4q.checkpoint.files import named
from dsv4q.errors import OutputError

LOCK_FILES = _LOCK, _OWNER = ("lock", "owner.json")


class OutputLock:
    """The lock of one work folder, taken.

    Attributes:
        warning: what to tell where `flock` does not work.

    Raises (from `take`):
        OutputError: another run has it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, handle: int, warning: str | None) -> None:
        self._folder, self.handle, self.warning = folder, handle, warning
        """Of the lock file, open."""

    @classmethod
    def take(cls, folder: Path) -> OutputLock:
        """Take the lock of a work folder that is there."""
        path = folder / _LOCK
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            return cls(folder, handle, _take(folder, handle))
        except BaseException:
            os.close(handle)
            raise

    def release(self) -> None:
        """Let it go; the lock file stays."""
        if self.warning is not None:
            (self._folder / _OWNER).unlink(missing_ok=True)
            self.warning = None
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def remove(self) -> None:
        """Delete the lock file and the folder, in which nothing else is left."""
        (self._folder / _LOCK).unlink()
        (self._folder / _OWNER).unlink(missing_ok=True)
        try:
            self._folder.rmdir()
        except OSError:  # NFS keeps a deleted file under another name until it is closed
            self.release()
            self._folder.rmdir()


def _take(folder: Path, handle: int) -> str | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(folder, "wait for it, or choose another output folder") from None
    except OSError as error:
        _take_ownership(folder)
        return f"{folder.parent}: this file system has no locks ({error.strerror}); {_OWNER} in {folder} stands for one"
    # A run that ends between open and flock takes its lock file away, and ours would guard nothing.
    if os.fstat(handle).st_nlink == 0:
        raise _taken(folder, "wait for it, or choose another output folder")
    return None


def _taken(folder: Path, hint: str, found: object = None) -> OutputError:
    return OutputError("Another run is writing into this folder", where=folder.parent, found=found, hint=hint)


def _take_ownership(folder: Path) -> None:
    path = folder / _OWNER
    me = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}
    for _ in range(2):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            owner = _read(path)
            if owner is None or not _is_gone(owner):
                told = "an unreadable owner" if owner is None else f"process {owner.get('pid')} on {owner.get('host')}"
                raise _taken(folder, f"wait for it; if it is gone, remove {path}", told) from None
            _put_away(path, owner)
            continue
        with named(path):
            try:
                os.write(handle, json.dumps(me).encode())
            finally:
                os.close(handle)
        return
    raise _taken(folder, "wait for it, or choose another output folder")


def _put_away(path: Path, owner: dict[str, object]) -> None:
    """Delete the file of an owner that is gone, and not that of one who came meanwhile."""
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, mine)
        if _read(mine) != owner:
            with contextlib.suppress(OSError):
                os.link(mine, path)
        mine.unlink()


def _read(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_gone(owner: dict[str, object]) -> bool:
    """Whether it was a process of this machine that does not run any more."""
    pid = owner.get("pid")
    return owner.get("host") == _host() and isinstance(pid, int) and _started(pid) != owner.get("started")


def _host() -> str:
    """This machine since it was started, as far as Linux tells."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}".strip()


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if there is none, or where nobody tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
