"""The machine: the device that `--device` names, memory in use, started ranks, signals at places of our choosing.

Python raises KeyboardInterrupt between any two steps of the main thread, also while it holds the lock of a future that
a worker waits for; then the pool never ends and the run hangs instead of stopping. So during a run the signal only sets
a flag, and the run asks for it between tensors and micro-batches. SIGTERM, which torchrun and Slurm send to what they
end, and SIGHUP, which a terminal that is closed sends, are taken in the same way, so that a rank says why it ends.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import shutil
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4q.errors import DeviceError, RankError

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda or cuda:N; tried out.

    Raises:
        DeviceError: another name; no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    expected = "auto, cpu, cuda or cuda:N"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise DeviceError("There is no such device", where="--device", expected=expected, found=repr(name))
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            "There is no such device", where=f"--device {name}", expected=expected, found=str(error).splitlines()[0]
        ) from error
    return device


@contextmanager
def gpu_memory_errors(
    where: str | Path, *, while_: str = "", expected: str | None = None, hint: str | None = None
) -> Iterator[None]:
    """Context in which a GPU that is full is an error for people.

    Args:
        while_: what was done, if that is not plain: ` while …`.

    Raises:
        DeviceError: torch could not allocate.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        found = str(error).splitlines()[0]
        what = f"The GPU ran out of memory{while_}"
        raise DeviceError(what, where=where, expected=expected, found=found, hint=hint) from error


@contextmanager
def prompt_threads() -> Iterator[None]:
    """Context in which a thread that computes lets another have Python within half a millisecond, not five.

    The thread that starts a GPU's work gives Python up in every call, and waits for it behind those that read.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_alone() -> None:
    """From now on torch computes on the calling thread alone; other threads are as before.

    `torch.set_num_threads` is of all threads to come too, and of what a fork leaves of them. So OpenMP is asked itself,
    whose number is the thread's own. Where it is not found everything goes on as it was, slower.
    """
    import torch

    torch.get_num_threads()  # or torch would set its usual number when the thread first computes
    for library in _openmp():
        library.omp_set_num_threads(1)


@cache
def _openmp() -> tuple[ctypes.CDLL, ...]:
    """Every OpenMP that is loaded, of Linux' own list of mapped files."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    files = {match[0] for line in lines if (match := re.search(r"/\S*/lib(gomp|i?omp5?)\b[^/]*\.so[^/]*$", line))}
    return tuple(ctypes.CDLL(file) for file in sorted(files))


def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes: `host`, resident; on a GPU also `gpu`, what torch has allocated on `device`."""
    found = {"host": _resident()}
    if device.type == "cuda":
        import torch

        found["gpu"] = int(torch.cuda.memory_allocated(device))
    return found


def _resident() -> int:
    """From Linux' own count of pages; elsewhere only the peak is known."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process: resident host memory, and GPU memory if torch used one."""
    peak = {"host": _peak_resident()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu"] = int(torch.cuda.max_memory_allocated())
    return peak


def _peak_resident() -> int:
    # Linux hands getrusage's number on through exec, so a child of a large process would report its parent's peak
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(path: Path) -> int | None:
    """Bytes that an ordinary user can still write where `path` lies or will lie; None where a mount does not tell."""
    probe = path.absolute()
    while not probe.exists():
        probe = probe.parent
    usage = shutil.disk_usage(probe)
    return usage.free if usage.total else None


def used_bytes(folder: Path) -> int:
    """Bytes of the disk that all files below `folder` take; those that go meanwhile may count or not."""
    nbytes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            nbytes += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return nbytes


@dataclass(frozen=True)
class RankVariables:
    """What the environment says of this process as one of several ranks."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    meet: str = ""
    """Where they meet, host and port."""
    by_torchrun: bool = False


_RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What a rank needs to know; torchrun sets all of it, and TORCHELASTIC_RUN_ID."""


def rank_variables() -> RankVariables:
    """This process among the ranks that torchrun, or somebody like it, started; one alone where nobody did.

    Schedulers leave some of the variables in every process of a pod. So they count only where torchrun names itself, or
    all of them are there; see `leftover_ranks`.

    Raises:
        RankError: a variable that is missing under torchrun, or whose value is impossible.
    """
    by_torchrun = bool(os.environ.get("TORCHELASTIC_RUN_ID"))
    missing = _missing_rank_variables()
    if missing and not by_torchrun:
        return RankVariables()
    if missing:
        raise RankError(
            "A variable of this rank is missing or empty",
            where=", ".join(missing),
            expected=f"{', '.join(_RANK_VARIABLES)}, as torchrun sets them",
            found="TORCHELASTIC_RUN_ID, without them",
            hint="start it with torchrun, or unset TORCHELASTIC_RUN_ID to run one process",
        )
    count = _number("WORLD_SIZE", 1)
    return RankVariables(
        rank=_number("RANK", 0, count - 1),
        count=count,
        local_rank=_number("LOCAL_RANK", 0),
        local_count=_number("LOCAL_WORLD_SIZE", 1) if os.environ.get("LOCAL_WORLD_SIZE") else 1,
        meet=f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT', 0, 65535)}",
        by_torchrun=by_torchrun,
    )


def leftover_ranks() -> str | None:
    """What to say of variables that speak of several ranks to a process that nobody started as one of them."""
    names = [name for name in ("WORLD_SIZE", "RANK") if os.environ.get(name, "") not in ("", "0", "1")]
    missing = _missing_rank_variables()
    if not names or not missing or os.environ.get("TORCHELASTIC_RUN_ID"):
        return None
    found = ", ".join(f"{name}={os.environ[name]}" for name in names)
    return (
        f"{found} is in the environment, but torchrun did not start this process ({', '.join(missing)} missing): it "
        "does all of the work alone"
    )


def _missing_rank_variables() -> list[str]:
    return [name for name in _RANK_VARIABLES if not os.environ.get(name)]


def _number(name: str, least: int, most: int | None = None) -> int:
    text = os.environ[name]
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least or (most is not None and int(text) > most):
        raise RankError(
            "A variable of this rank has an impossible value",
            where=name,
            expected=f"a number of at least {least}" if most is None else f"a number from {least} to {most}",
            found=repr(text),
            hint="start it with torchrun, or unset it to run one process",
        )
    return int(text)


def is_first_rank() -> bool:
    """Of those that torchrun started; a process alone is the first.

    Raises:
        RankError: as `rank_variables`.
    """
    return rank_variables().rank == 0


PATIENCE = 10.0
"""Seconds after SIGTERM in which a rank has to come to a place where it may end. torchrun kills after 30."""


@contextmanager
def _ended_if_stuck(awake: threading.Event) -> Iterator[None]:
    """Context that ends this rank, with a word, if so long after SIGTERM it has not left it and is not `awake`.

    A kernel of NCCL waits for a peer that is gone for as long as its timeout, hours here, and the main thread, which
    waits for the kernel, runs no Python in which a signal would be heard. So another thread hears it.
    """
    heard, pipe = socket.socketpair()
    pipe.setblocking(False)

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] == signal.SIGTERM and not awake.wait(PATIENCE):
                error = RankError(
                    "This rank was told to end and does not come out of its wait for the others; one of them is gone",
                    where=f"rank {os.environ.get('RANK', '0')}",
                    found=f"nothing that can be interrupted in {PATIENCE:.0f} s after SIGTERM",
                    hint="the message of the rank that failed first says why; finished blocks are kept, and the same "
                    "command goes on from there, with any number of ranks",
                )
                os.write(2, f"error: {error.text()}\n".encode())
                os._exit(1)

    before = signal.set_wakeup_fd(pipe.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, name="dsv4q-signals", daemon=True).start()
    try:
        yield
    finally:
        awake.set()
        signal.set_wakeup_fd(before)
        pipe.close()


@contextmanager
def quick_beginning() -> Iterator[None]:
    """Context of a command in which Python does not search for reference cycles until its long work: `stoppable`, or
    where that says so `end_beginning`.

    Imports and plans make millions of objects, all of which stay, and each search looks through them again: a quarter
    of the beginning.
    """
    global _beginning
    before = gc.isenabled()
    gc.disable()
    _beginning = before
    try:
        yield
    finally:
        gc.unfreeze()
        _beginning = False
        if before:
            gc.enable()


_beginning = False
"""Whether a command's `quick_beginning` has not come to its long work yet."""


def end_beginning() -> None:
    """Search for cycles again, but not among the objects that are there by now."""
    global _beginning
    if _beginning:
        gc.freeze()
        gc.enable()
        _beginning = False


@contextmanager
def stoppable(*, still_beginning: bool = False) -> Iterator[Callable[[], None]]:
    """Context in which Ctrl-C, SIGTERM and SIGHUP wait for a call of the function that it gives.

    Raises (from the function, and at the end):
        KeyboardInterrupt: there was such a signal.

    A second Ctrl-C ends the process at once; what is finished is on disk at any moment. Once one of several ranks has
    failed in here, it does not heed SIGTERM any more; one that cannot be reached is ended (`PATIENCE`). Off the main
    thread, where no handler can be set, signals are left as they are. Ends a `quick_beginning`, unless the command is
    `still_beginning`.
    """
    if not still_beginning:
        end_beginning()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: set[int] = set()
    awake = threading.Event()

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            os._exit(1)
        asked.add(number)

    def check() -> None:
        if asked:
            awake.set()  # what is under way is still brought to its end, however long that takes
            raise KeyboardInterrupt

    # Under nohup SIGHUP is ignored, and has to stay so. A shell's background job ignores SIGINT too, but only from a
    # terminal: who sends it one means it.
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = (signal.SIGINT, signal.SIGTERM, *(() if nohup else (signal.SIGHUP,)))
    before = {number: signal.signal(number, note) for number in numbers}
    several = rank_variables().count > 1
    try:
        with _ended_if_stuck(awake) if several else nullcontext():
            yield check
    except BaseException:
        if several:
            # torchrun sends SIGTERM to all ranks when one fails: what this one has to say and to clean comes first.
            del before[signal.SIGTERM]
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    check()
