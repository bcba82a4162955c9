"""What this machine can do at most: storage, page cache, copies, matmul, sha256. Prints one JSON object.

    python scripts/ceilings.py FOLDER [--source CHECKPOINT] [--device cuda] [--gigabytes 4]

FOLDER is where files would be written; reads are of CHECKPOINT's files, brought into the page cache first. Values are
GB/s (10^9), and TFLOP/s for the matmul. Each but writing is the best of a few tries, for it is to be a ceiling.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch

CHUNK = 16 << 20
THREADS = (1, 4, 8)

Extent = tuple[Path, int, int]
"""File, offset, bytes."""


def seconds(call: Callable[[], object], tries: int = 1) -> float:
    """Wall time of the fastest of `tries` calls."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def write_speed(folder: Path, nbytes: int, threads: int) -> float:
    """GB/s of as many threads, each with a file of its own, with pwrite and at the end fsync."""
    data = memoryview(os.urandom(min(CHUNK, nbytes // threads)))
    paths = [folder / f"ceiling-{i}" for i in range(threads)]

    def write(path: Path) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for offset in range(0, nbytes // threads, len(data)):
                left = data
                while left:
                    left = left[os.pwrite(handle, left, offset + len(data) - len(left)) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    with ThreadPoolExecutor(threads) as pool:
        took = seconds(lambda: list(pool.map(write, paths)))
    written = sum(path.stat().st_size for path in paths)
    for path in paths:
        path.unlink()
    return written / 1e9 / took


def extents(files: Sequence[Path], nbytes: int) -> list[Extent]:
    """The first `nbytes` of these files, or all there is, in chunks."""
    found: list[Extent] = []
    for path in files:
        size = path.stat().st_size
        for offset in range(0, size, CHUNK):
            if nbytes <= 0:
                return found
            length = min(CHUNK, size - offset, nbytes)
            found.append((path, offset, length))
            nbytes -= length
    return found


def read_speed(wanted: Sequence[Extent], buffer: memoryview, threads: int) -> float:
    """GB/s of preadv from the page cache into `buffer`, which has room for all."""
    handles = {path: os.open(path, os.O_RDONLY) for path, _, _ in wanted}
    starts = list(accumulate((length for _, _, length in wanted), initial=0))

    def read(item: tuple[Extent, int]) -> None:
        (path, offset, length), start = item
        done = 0
        while done < length:
            done += os.preadv(handles[path], [buffer[start + done : start + length]], offset + done)

    with ThreadPoolExecutor(threads) as pool:
        took = seconds(lambda: list(pool.map(read, zip(wanted, starts[:-1], strict=True))), tries=3)
    for handle in handles.values():
        os.close(handle)
    return starts[-1] / 1e9 / took


def storage(folder: Path, source: Path | None, nbytes: int, pinned: bool) -> dict[str, float]:
    """GB/s of writing into `folder` and of reading `source`, by number of threads."""
    found = {f"write, fsync, {t} threads": write_speed(folder, nbytes, t) for t in THREADS}
    wanted = extents(sorted(source.glob("*.safetensors")), nbytes) if source else []
    if wanted:
        total = sum(length for _, _, length in wanted)
        buffer = memoryview(torch.empty(total, dtype=torch.uint8, pin_memory=pinned).numpy())
        read_speed(wanted, buffer, 8)
        found |= {f"read, page cache, {t} threads": read_speed(wanted, buffer, t) for t in THREADS}
    return found


def copies(nbytes: int) -> dict[str, float]:
    """GB/s between pinned host memory and the GPU, each way."""
    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    there = host.cuda()

    def copy(to: torch.Tensor, of: torch.Tensor) -> None:
        to.copy_(of, non_blocking=True)
        torch.cuda.synchronize()

    return {
        "pinned host to device": nbytes / 1e9 / seconds(lambda: copy(there, host), 4),
        "device to pinned host": nbytes / 1e9 / seconds(lambda: copy(host, there), 4),
    }


def matmul_speed(device: str, rows: int) -> float:
    """TFLOP/s of BF16 [rows, 4096] x [4096, 2048], the gate of one expert on `rows` tokens."""
    left = torch.randn(rows, 4096, device=device).to(torch.bfloat16)
    right = torch.randn(4096, 2048, device=device).to(torch.bfloat16)
    calls = 50 if left.is_cuda else 1

    def many() -> None:
        for _ in range(calls):
            left @ right
        if left.is_cuda:
            torch.cuda.synchronize()

    many()
    return 2 * rows * 4096 * 2048 * calls / 1e12 / seconds(many, 5)


def measure(folder: Path, source: Path | None, device: str, nbytes: int) -> dict[str, float]:
    """Every ceiling: GB/s, and TFLOP/s where the name says so."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = device.startswith("cuda")
    found = storage(folder, source, nbytes, pinned=gpu)
    if gpu:
        found |= copies(min(nbytes, 1 << 30))
    rows = 16384 if gpu else 256
    found[f"BF16 matmul [{rows}, 4096] x [4096, 2048], TFLOP/s"] = matmul_speed(device, rows)
    data = os.urandom(min(nbytes, 256 << 20))
    found["sha256, 1 thread"] = len(data) / 1e9 / seconds(lambda: hashlib.sha256(data).digest(), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, options.source, options.device, int(options.gigabytes * 1e9))))


if __name__ == "__main__":
    main()
