"""What this machine can do when several processes use it at once. Prints one JSON object, GB/s (10^9) over all of them.

    python -m torch.distributed.run --standalone --nproc-per-node N scripts/ceilings_ranks.py FOLDER
        [--device cuda] [--gigabytes 4]

FOLDER is where files would be written, GIGABYTES by all together, with pwrite and at the end fsync: into one file for
each process, and into one file of all, which one of them syncs. Copies are of GIGABYTES / 4 by each process at once.
In the exchange each rank in turn sends its part of a whole to all others, as a run does with experts; the figure is
what one rank receives. One process needs no torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsv4q.console import Console, Mode
from dsv4q.host import usable_device
from dsv4q.run.ranks import Ranks, ranks

CHUNK = 16 << 20
TRIES = 3


def together(here: Ranks, call: Callable[[], object], tries: int = 1) -> float:
    """Seconds from when all ranks begin a call until all are through, the fastest of some; on rank 0."""
    times = []
    for _ in range(tries):
        here.wait_for_all()
        begin = time.perf_counter()
        call()
        here.wait_for_all()
        times.append(time.perf_counter() - begin)
    return min(times)


def write_speed(here: Ranks, folder: Path, nbytes: int, *, shared: bool) -> float:
    """GB/s of all ranks into files of their own or into one."""
    rank, count = here.share.rank, here.share.count
    part = nbytes // count // CHUNK * CHUNK
    data = memoryview(os.urandom(CHUNK))
    path = folder / f"ceiling-{0 if shared else rank}"
    start = rank * part if shared else 0
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def write() -> None:
        for offset in range(start, start + part, CHUNK):
            left = data
            while left:
                left = left[os.pwrite(handle, left, offset + CHUNK - len(left)) :]
        if shared:
            here.wait_for_all()
        if not shared or here.is_leader:
            os.fsync(handle)

    took = together(here, write)
    os.close(handle)
    path.unlink(missing_ok=True)
    return count * part / 1e9 / took


def copy_speed(here: Ranks, nbytes: int, device: torch.device) -> float:
    """GB/s of all ranks copying from page-locked memory to their device, or on a CPU from memory to memory."""
    cuda = device.type == "cuda"
    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=cuda)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    copy()
    return here.share.count * nbytes / 1e9 / together(here, copy, TRIES)


def exchange_speed(here: Ranks, nbytes: int, device: torch.device) -> float:
    """GB/s that one rank receives while a stack of `nbytes` is exchanged."""
    count = here.share.count
    stack = torch.zeros((count, nbytes // count), dtype=torch.uint8, device=device)

    def exchange() -> None:
        here.exchange(stack)
        if device.type == "cuda":
            torch.cuda.synchronize()

    exchange()
    return stack.nbytes * (count - 1) / count / 1e9 / together(here, exchange, TRIES)


def measure(here: Ranks, folder: Path, device: torch.device, nbytes: int) -> dict[str, float]:
    """Every ceiling of so many processes, GB/s."""
    processes = f"{here.share.count} processes"
    to = "pinned host to device" if device.type == "cuda" else "host to host"
    found = {
        f"write, fsync, {processes}, own files": write_speed(here, folder, nbytes, shared=False),
        f"write, fsync, {processes}, one file": write_speed(here, folder, nbytes, shared=True),
        f"{to}, {processes}": copy_speed(here, nbytes // 4, device),
        f"host to host, {processes}": copy_speed(here, nbytes // 4, torch.device("cpu")),
    }
    if not here.is_alone:
        found[f"exchange, {processes}"] = exchange_speed(here, nbytes // 4, device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    options = parser.parse_args()
    with ranks(options.device, Console(Mode.QUIET)) as here:
        device = usable_device(here.device_name(options.device))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        options.folder.mkdir(parents=True, exist_ok=True)
        found = measure(here, options.folder, device, int(options.gigabytes * 1e9))
        if here.is_leader:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
