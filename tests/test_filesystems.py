"""OUT on file systems that lack what a local disk has: a run goes on where that is safe, and every refusal is named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4q.checkpoint.files import WORK
from users import LAST, config, dsv4q, small_source, stopping_at


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("filesystems") / "source")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A shard as a local disk gets it."""
    folder = tmp_path_factory.mktemp("local")
    assert dsv4q("quantize", source, folder / "out", "-c", config(folder), "--device", "cpu").code == 0
    return (folder / "out" / LAST).read_bytes()


def failing(number: int) -> Callable[..., object]:
    def call(*_: object) -> object:
        raise OSError(number, os.strerror(number))

    return call


def fsync_without(number: int, kind: Callable[[int], bool]) -> Callable[[int], None]:
    """`os.fsync` that fails for folders, or for files."""
    real = os.fsync

    def call(handle: int) -> None:
        if kind(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    return call


LACKS: dict[str, tuple[object, str, Callable[[], object], str]] = {
    "flock on Lustre": (fcntl, "flock", lambda: failing(errno.ENOSYS), "has no locks"),
    "flock on NFS": (fcntl, "flock", lambda: failing(errno.ENOLCK), "has no locks"),
    "fchmod on a bucket": (os, "fchmod", lambda: failing(errno.EPERM), "file modes of its own"),
    "fchmod on another bucket": (os, "fchmod", lambda: failing(errno.ENOTSUP), "file modes of its own"),
    "fsync of folders": (os, "fsync", lambda: fsync_without(errno.EINVAL, stat.S_ISDIR), "make renames durable"),
    "fsync of files": (os, "fsync", lambda: fsync_without(errno.ENOSYS, stat.S_ISREG), "make files durable"),
    "posix_fadvise": (os, "posix_fadvise", lambda: failing(errno.EINVAL), ""),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_file_system_that_lacks_something_takes_the_same_bytes_with_a_warning(
    lack: str, source: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, call, words = LACKS[lack]
    monkeypatch.setattr(module, name, call())
    said = dsv4q("quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu")
    assert said.code == 0
    assert words in said.err
    assert ("warning: " in said.err) == bool(words)
    assert (tmp_path / "out" / LAST).read_bytes() == expected
    assert not (tmp_path / "out" / WORK).exists()


# ------------------------------------------------------------------------------------------------ without flock


def owned(source: Path, tmp_path: Path, **changes: object) -> tuple[str, ...]:
    """A run that was killed where there is no flock, and whose owner's file says what is told here."""
    line = ("quantize", str(source), str(tmp_path / "out"), "-c", str(config(tmp_path)), "--device", "cpu")
    with stopping_at("layers.1"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4q.checkpoint.lock.OutputLock.release", lambda self: None)
        dsv4q(*line)
    owner = tmp_path / "out" / WORK / "owner.json"
    owner.write_text(json.dumps(json.loads(owner.read_text()) | changes))
    return line


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_second_run_is_refused_all_the_same(source: Path, tmp_path: Path) -> None:
    said = dsv4q(*owned(source, tmp_path))  # the owner's process is this one
    assert said.code == 1
    assert "Another run is writing into this folder" in said.err
    assert f"process {os.getpid()}" in said.err


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_run_that_was_killed_is_gone_on_with(source: Path, expected: bytes, tmp_path: Path) -> None:
    said = dsv4q(*owned(source, tmp_path, started="1"))  # another process had this number
    assert said.code == 0
    assert "Resuming" in said.err
    assert (tmp_path / "out" / LAST).read_bytes() == expected


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_run_of_another_machine_is_named_and_may_be_removed(source: Path, tmp_path: Path) -> None:
    line = owned(source, tmp_path, host="elsewhere")
    said = dsv4q(*line)
    assert said.code == 1
    assert "on elsewhere" in said.err
    owner = tmp_path / "out" / WORK / "owner.json"
    assert str(owner) in said.err
    owner.unlink()
    assert dsv4q(*line).code == 0


# ------------------------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize("call", ["fsync", "write", "pwritev", "replace", "fchmod"])
def test_a_disk_that_fails_is_named_with_file_and_cause(
    call: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, failing(errno.EIO))
    said = dsv4q("quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu")
    assert said.code == 1
    assert os.strerror(errno.EIO) in said.err
    assert f"where: {tmp_path / 'out'}" in said.err
