"""Full-width DeepSeek-V4 layers: stock llmcompressor, `dsv4q quantize`, and what the machine allows, in one run.

    python scripts/bench_layer.py WORK [--layers 3] [--samples 64] [--length 512] [--micro-batch 8] [--device cuda]
        [--config nvfp4-fp8-mtp] [--source FOLDER] [--only ceilings,stock,sink,files]
        [--stock-batches 1,8] [--stock-layers K] [--double] [--profile] [--twin] [--verify] [--json FILE]
        [--width full|pro|toy] [--native] [--ranks 1,2,4] [--gpu-memory BYTES]

Makes a source of K layers of the real width (hidden 4096, 256 experts of 2048; 13.2 GB of BF16 each; weights on the
MXFP4 and FP8 grids) in WORK/source, or FOLDER, unless it is there, and lets all parts work on the same files, each in
a process of its own, so that its peaks are its own. Prints Markdown tables.

With `--ranks` ceilings, sink and files are measured once for each number of ranks, on as many GPUs under torchrun, each
rank with its own seconds; the digests of all blocks are compared. Each measurement is one line of JSON as it is done.

    ceilings  storage in WORK, page cache, copies, matmul, sha256 (ceilings.py)
    stock     llmcompressor's sequential pipeline and save, per batch size (bench_stock.py)
    sink      dsv4q with the bytes dropped after they were encoded and copied to the host (bench_dsv4q.py)
    files     dsv4q quantize with real, fsynced shards

`--twin` runs the files once more with the experts taken linear by linear under llmcompressor's hooks, and compares
the digests of all blocks. `--double` runs the sink on 2K layers too, for the peaks. A source in /dev/shm is in memory
for certain; one on a disk may still be on its way there and slow the writes that are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench_dsv4q import add_settings
from bench_source import dimensions, first_layers, write_source
from bench_tables import tables

HERE = Path(__file__).parent
PARTS = ("ceilings", "stock", "sink", "files")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    add_settings(parser)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", choices=("full", "pro", "toy"), default="full")
    parser.add_argument("--source", type=Path, help="where the source is or is to be made")
    parser.add_argument("--only", default=",".join(PARTS), help="comma list of " + ", ".join(PARTS))
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--stock-batches", default="1,8")
    parser.add_argument("--stock-layers", type=int, help="stock on the first so many layers only")
    parser.add_argument("--ranks", default="1", help="comma list of numbers of ranks, ascending")
    parser.add_argument("--native", action="store_true", help="a source in DeepSeek's own layout; stock cannot read it")
    parser.add_argument("--double", action="store_true", help="the sink on twice the layers, too")
    parser.add_argument("--profile", action="store_true", help="the sink once more, one layer under torch.profiler")
    parser.add_argument("--twin", action="store_true", help="files once more with experts as modules: the same bytes?")
    parser.add_argument("--verify", action="store_true", help="judge the artifact against the source")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="data to measure the storage with")
    parser.add_argument("--json", type=Path, help="everything that was measured, for machines")
    options = parser.parse_args()
    options.counts = [int(count) for count in options.ranks.split(",")]
    no_stock = options.no_stock or options.native
    options.parts = [p for p in options.only.split(",") if not (p == "stock" and no_stock)]
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    return options


def child(options: argparse.Namespace, script: str, *arguments: object, ranks: int = 1) -> dict[str, Any]:
    """Run one of the scripts, several ranks under torchrun; the JSON object on the last line of its output.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why on stderr.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(HERE / script), *map(str, arguments), "--device", options.device]
    hidden = {} if options.device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, "LLM_COMPRESSOR_LOG_DISABLED": "true", "TQDM_DISABLE": "1", **hidden}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def settings(options: argparse.Namespace, batch: int) -> list[object]:
    return ["--config", options.config, "--samples", options.samples, "--length", options.length,
            "--micro-batch", batch]  # fmt: skip


def run_dsv4q(options: argparse.Namespace, source: Path, *flags: str, ranks: int = 1) -> dict[str, Any]:
    out = fresh(options.work / "artifact")
    capped = [] if options.gpu_memory is None else ["--gpu-memory", options.gpu_memory]
    arguments = (source, out, *settings(options, options.micro_batch), *capped, *flags)
    return child(options, "bench_dsv4q.py", *arguments, ranks=ranks)


def run_stock(options: argparse.Namespace, source: Path, batch: int) -> dict[str, Any]:
    out = fresh(options.work / "stock")
    found = child(options, "bench_stock.py", source, out, *settings(options, batch))
    shutil.rmtree(out)
    return found | {"batch": batch}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def sources(options: argparse.Namespace) -> dict[int, Path]:
    """Layers -> checkpoint of that many, all of the same files; makes the largest unless it is there."""
    whole = options.source or options.work / "source"
    layers = options.layers * (2 if options.double else 1)
    if not (whole / "config.json").is_file():
        begin = time.perf_counter()
        whole.parent.mkdir(parents=True, exist_ok=True)
        write_source(whole, dimensions(options.width, layers), options.device, native=options.native)
        print(f"source of {layers} layers made in {time.perf_counter() - begin:.1f} s\n", flush=True)
    there = json.loads((whole / "config.json").read_text())["num_hidden_layers"]
    wanted = {options.layers, layers, options.stock_layers or options.layers}
    if max(wanted) > there:
        sys.exit(f"{whole} has {there} layers, {max(wanted)} are wanted: remove it, or name another --source")
    return {n: whole if n == there else first_layers(whole, whole.with_name(f"{whole.name}-{n}"), n) for n in wanted}


def machine(script: str, device: str) -> dict[str, Any]:
    """Where and with what this script runs."""
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else "none"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    names = ("torch", "transformers", "llmcompressor", "compressed-tensors")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python scripts/{script} WORK " + " ".join(sys.argv[2:]),
        "machine": f"GPU: {gpu}; {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB; {platform.machine()}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in names),
    }


def parts(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What was asked for, by name, in order."""
    of = sources(options)
    source = of[options.layers]
    if "ceilings" in options.parts:
        arguments = (options.work / "ceilings", "--source", source, "--gigabytes", options.gigabytes)
        yield "ceilings", lambda: child(options, "ceilings.py", *arguments)
    for count in options.counts:
        yield from parts_of_ranks(options, source, count)
    if "sink" in options.parts:
        if options.double:
            yield "double", lambda: run_dsv4q(options, of[2 * options.layers], "--sink")
        if options.profile:
            yield "profile", lambda: run_dsv4q(options, source, "--sink", "--profile")["profile"]
    if "files" in options.parts:
        if options.verify:
            yield "verified", lambda: verified(options, source)
        if options.twin:
            yield "twin", lambda: run_dsv4q(options, source, "--modules")
    if "stock" in options.parts:
        fresh(options.work / "artifact")
        few = of[options.stock_layers or options.layers]
        for batch in options.stock_batches.split(","):
            yield f"stock {batch}", lambda batch=batch: run_stock(options, few, int(batch))  # type: ignore[misc]


def parts_of_ranks(options: argparse.Namespace, source: Path, count: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured once for each number of ranks; of one rank the names are the plain ones."""
    more = f" x{count}" if count > 1 else ""
    if "ceilings" in options.parts and len(options.counts) > 1:
        arguments = (options.work / "ceilings", "--gigabytes", options.gigabytes)
        yield f"ceilings of ranks{more}", lambda: child(options, "ceilings_ranks.py", *arguments, ranks=count)
    if "sink" in options.parts:
        yield f"sink{more}", lambda: run_dsv4q(options, source, "--sink", ranks=count)
    if "files" in options.parts:
        yield f"files{more}", lambda: run_dsv4q(options, source, ranks=count)


def verified(options: argparse.Namespace, source: Path) -> dict[str, Any]:
    """What `verify-shards --deep --source` says of the artifact."""
    from dsv4q.verify.judge import verify

    begin = time.perf_counter()
    result = verify(options.work / "artifact", source=source, deep=True, progress=None, device=options.device)
    return {"seconds": time.perf_counter() - begin, "differences": [d.text() for d in result.differences]}


def as_line(measured: dict[str, Any]) -> dict[str, Any]:
    """A measurement without its longest parts, which `--json` keeps."""
    return {key: value for key, value in measured.items() if key not in ("profile", "kernels")}


def main() -> None:
    options = parse()
    settled = {name: getattr(options, name) for name in ("layers", "samples", "length", "micro_batch")}
    found: dict[str, Any] = {**machine("bench_layer.py", options.device), **settled}
    failed = []
    for name, measure in parts(options):
        try:
            found[name] = measure()
            print(json.dumps({"measurement": name, **as_line(found[name])}), flush=True)
        except subprocess.CalledProcessError:
            failed.append(name)
        if options.json:  # after each part, for a later one may not come to its end
            options.json.write_text(json.dumps(found, indent=1))
    print(tables(found))
    if failed or found.get("verified", {}).get("differences"):
        sys.exit(f"failed: {', '.join(failed) or 'the artifact is not as it must be'}")


if __name__ == "__main__":
    main()
