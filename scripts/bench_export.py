"""How fast `dsv4q export` writes, both ways, as a share of what the disk takes at most.

    python scripts/bench_export.py WORK [--made FOLDER] [--layers 4] [--experts N] [--width full|pro|toy]
        [--device cuda] [--gigabytes 6] [--repeat 1] [--profile]

Makes a native source of K layers of the real width (3.6 GB each) and its artifact by the bounds, without data, in
FOLDER (else WORK) unless they are there; exports it to ModelOpt's layout in WORK, and that back. Just before and after
each the disk is measured by plain writes with fsync (ceilings.py). A GPU makes source and artifact quickly; the export
uses none. A FOLDER in /dev/shm is in memory for certain, and leaves the disk to what is written. Each export takes 4
GB a layer there and is removed at the end. Prints a line for each export, and one JSON array.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_source import dimensions, write_source
from ceilings import write_speed
from dsv4q.config import Activations, Output, load_config
from dsv4q.console import Console, Mode
from dsv4q.export.job import Export
from dsv4q.export.story import export
from dsv4q.foreign.modelopt import COMPRESSED, MODELOPT
from dsv4q.quantize import Job, quantize

QUIET = Console(Mode.QUIET)


def ceiling(folder: Path, nbytes: int) -> float:
    """GB/s of plain writes with fsync, of the better number of threads; what was written before is on the disk."""
    os.sync()
    return max(write_speed(folder, nbytes, threads) for threads in (4, 8))


def made(options: argparse.Namespace) -> tuple[Path, Path]:
    """Source and artifact; made if they are not there."""
    folder: Path = options.made or options.work
    folder.mkdir(parents=True, exist_ok=True)
    source, artifact = folder / "source", folder / "artifact"
    if not source.exists():
        toy = dimensions(options.width, options.layers)
        toy = replace(toy, n_routed_experts=options.experts or toy.n_routed_experts)
        write_source(source, toy, options.device, native=True)
    config = load_config(Path("nvfp4-fp8")).model_copy(
        update={
            "activations": Activations(scales="bound"), "calibration": None,
            "output": Output(shards=max(1, options.layers)),
        }
    )  # fmt: skip
    quantize(Job(source, artifact, config, options.device), QUIET)
    return source, artifact


def measured(job: Export, gigabytes: float, profile: bool) -> dict[str, Any]:
    """One export into a new folder, with the disk's own speed around it."""
    shutil.rmtree(job.out, ignore_errors=True)
    before = ceiling(job.out.parent, int(gigabytes * 1e9))
    os.sync()
    profiler = cProfile.Profile()
    begin = time.perf_counter()
    report = profiler.runcall(export, job, QUIET) if profile else export(job, QUIET)
    seconds = time.perf_counter() - begin
    after = ceiling(job.out.parent, int(gigabytes * 1e9))
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    nbytes = report["artifact"]["bytes"]
    rate = nbytes / 1e9 / seconds
    return {
        "layout": job.layout, "gigabytes": round(nbytes / 1e9, 3), "seconds": round(seconds, 3),
        "gigabytes_per_second": round(rate, 3), "ceiling_before": round(before, 3), "ceiling_after": round(after, 3),
        "share_of_before": round(rate / before, 3), "share_of_after": round(rate / after, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--made", type=Path, help="where source and artifact are or are to be made")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="of a layer, if not all")
    parser.add_argument("--width", choices=("full", "pro", "toy"), default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="written to find what the disk takes")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="the main thread's functions by their own time")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source, artifact = made(options)
    there, back = options.work / "modelopt", options.work / "back"
    found = []
    for _ in range(options.repeat):
        for job in (Export(artifact, there, source, MODELOPT), Export(there, back, source, COMPRESSED)):
            found.append(measured(job, options.gigabytes, options.profile))
            one = found[-1]
            print(
                f"to {one['layout']}: {one['gigabytes']:.2f} GB in {one['seconds']:.2f} s, "
                f"{one['gigabytes_per_second']:.2f} GB/s; plain writes before {one['ceiling_before']:.2f} GB/s, "
                f"share {one['share_of_before']:.2f}; after {one['ceiling_after']:.2f} GB/s, "
                f"share {one['share_of_after']:.2f}",
                flush=True,
            )
    for folder in (there, back):
        shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
