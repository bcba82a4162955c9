"""The machine: the device that `--device` names, memory in use, Ctrl-C and SIGTERM at places of our choosing.

Python raises KeyboardInterrupt between any two steps of the main thread, also while it holds the lock of a future that
a worker waits for; then the pool never ends and the run hangs instead of stopping. So during a run the signal only sets
a flag, and the run asks for it between tensors and micro-batches. SIGTERM, which torchrun and Slurm send to what they
end, is taken in the same way, so that a rank says why it ends.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4q.errors import DeviceError

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


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user can still write where `path` lies or will lie."""
    probe = path.absolute()
    while not probe.exists():
        probe = probe.parent
    return shutil.disk_usage(probe).free


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Context in which Ctrl-C and SIGTERM wait for a call of the function that it gives: it raises KeyboardInterrupt.

    A second Ctrl-C ends the process at once; what is finished is on disk at any moment. Off the main thread, where no
    handler can be set, signals are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: set[int] = set()

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            os._exit(1)
        asked.add(number)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    check()
