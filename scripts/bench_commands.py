"""What DeepSeek's own files cost: whole commands on full-width layers, of this version and an older one, in turns.

    python scripts/bench_commands.py WORK --made FOLDER [--only LINE,...] [--before CHECKOUT] [--layers 7] [--few 3]
        [--width full|toy] [--device cuda] [--cores 16] [--gigabytes 6] [--touch GB]
        [--limit 250] [--json FILE]

Makes a source in DeepSeek's own layout and its artifact by the bounds in FOLDER, unless they are there: 7.6 GB a layer,
best in /dev/shm. What is written goes to WORK, a folder of the disk to be measured, and is removed. Each measurement is
a process of its own; its command and what it found are a line of JSON as soon as it is done. The table comes last.

    sink          bench_dsv4q.py --sink: the bytes are dropped where they would be written
    gpu-memory    the same with --gpu-memory 16GB
    files         bench_dsv4q.py with real, fsynced shards
    bf16          sink on a BF16 source, which is made for it: 13.2 GB a layer, four layers
    ranks         sink and files on two GPUs
    judge         dsv4q verify-shards --deep --source
    judge-cpu     the same with --device cpu
    convert-cpu   dsv4q quantize --device cpu of a config that needs no data
    dequantize    dsv4q dequantize, twice
    dequantize-cpu
    eval          dsv4q eval, 64 texts of 512 tokens
    start         bench_start.py --stop: dsv4q rehearse of all layers until the first one's forward
    rehearse      dsv4q rehearse of all layers, in DeepSeek's own layout and unjudged where the version can; the disk's
                  share of it is bench_writes.py --whole, half of it before and half of it after

With `--before` each line that the older version has is measured with its `src` and `scripts` too, on fewer layers, for
it takes longer; on a CPU on one narrow layer, of 32 experts, in GB/s of the whole command. Seconds a layer are the
difference between two runs of different numbers of layers. Where one run says when each layer was done they are the
mean of its last three, or of all but the first if they are written: the disk has several at once. Beside what is
written the disk alone is measured (ceilings.py), before and after. `--cores` limits all but `ranks` to so many cores.
Memory that a virtual machine has not used yet can cost several times as much to write to, also for the page cache: with
`--touch` so many GB of it are taken twice in FOLDER, before anything else, which tells how fast it was each time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from bench_layer import fresh, machine
from bench_source import dimensions, first_layers, write_source
from bench_tables import layers_of, steady, table
from ceilings import write_speed
from dsv4q.made_up.toy import ToyConfig

HERE = Path(__file__).parent
ALL_CORES = frozenset(os.sched_getaffinity(0))
FAILED = (subprocess.CalledProcessError, subprocess.TimeoutExpired)

Found = dict[str, Any]


@dataclass(frozen=True)
class Version:
    """A checkout whose commands are measured."""

    name: str
    root: Path

    @property
    def configs(self) -> Path:
        inside = self.root / "src" / "dsv4q" / "configs"
        return inside if inside.is_dir() else self.root / "configs"

    @property
    def rehearses_native(self) -> bool:
        return (self.root / "src" / "dsv4q" / "made_up" / "packed.py").is_file()

    def without_data(self, shards: int) -> dict[str, Any]:
        """Its own config, without data and draft."""
        raw = yaml.safe_load((self.configs / "nvfp4-fp8-mtp.yaml").read_text(encoding="utf-8"))
        del raw["calibration"]
        draft = raw.pop("mtp", None)  # as versions until November 2026 had it
        kept = {"draft": {"keep": False}} if draft is None else {"mtp": {"keep": False, "shared_head_copies": False}}
        return {**raw, **kept, "activations": {"scales": "bound"}, "output": {"shards": shards}}


@dataclass
class Bench:
    """What all lines share."""

    options: argparse.Namespace
    found: list[Found] = field(default_factory=list)
    """Each measurement that was made."""

    @property
    def now(self) -> Version:
        return Version("now", HERE.parent)

    @property
    def versions(self) -> list[Version]:
        before = self.options.before
        return [self.now, *([Version("before", before.resolve())] if before else [])]

    def size_of(self, version: Version) -> int:
        """Layers of one run; an older version takes longer for each."""
        return int(self.options.layers if version == self.now else self.options.few)

    # ------------------------------------------------------------------------------------------ files

    def source(self, layers: int) -> Path:
        """A native checkpoint of so many layers; all have the same files. 0: of one narrow layer."""
        if not layers:
            dims = dataclasses.replace(dimensions(self.options.width, 1), n_routed_experts=32)
            return self._made("narrow", dims)
        made = self._made("source", dimensions(self.options.width, self.options.layers))
        return first_layers(made, made.with_name(f"source-{layers}"), layers)

    def artifact(self, layers: int) -> Path:
        out = self.options.made / f"artifact-{layers}"
        if not out.exists():
            self.dsv4q(self.now, "quantize", self.source(layers), out, "--config", self.config(self.now, layers))
        return out

    def config(self, version: Version, layers: int) -> Path:
        path = self.options.made / f"bound-{version.name}-{layers}.yaml"
        path.write_text(yaml.safe_dump(version.without_data(max(1, layers))), encoding="utf-8")
        return path

    def model(self) -> tuple[object, ...]:
        """What to rehearse, unless it is DeepSeek-V4-Flash."""
        if self.options.width == "full":
            return ()
        small = self.options.work / "model" / "config.json"
        small.parent.mkdir(exist_ok=True)
        small.write_text(json.dumps(ToyConfig().as_config_json()), encoding="utf-8")
        return ("--source", small)

    def _made(self, name: str, dims: ToyConfig) -> Path:
        made: Path = self.options.made / name
        if not (made / "config.json").is_file():
            made.parent.mkdir(parents=True, exist_ok=True)
            write_source(made, dims, self.options.device, native=True)
        return made

    # ------------------------------------------------------------------------------------------ processes

    def python(self, version: Version, *arguments: object, ranks: int = 1) -> Found:
        """The JSON object that a command prints, with the `command` and its `wall` seconds.

        Raises:
            subprocess.CalledProcessError, subprocess.TimeoutExpired: it failed, or ran past the limit.
        """
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *torchrun, *map(str, arguments)]
        paths = [str(version.root / "src"), str(version.root / "scripts"), os.environ.get("PYTHONPATH", "")]
        hidden = {} if self.options.device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": ""}
        quiet = {"LLM_COMPRESSOR_LOG_DISABLED": "true", "TQDM_DISABLE": "1"}
        env = {**os.environ, **quiet, **hidden, "PYTHONPATH": ":".join(paths)}
        begin = time.perf_counter()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=env, check=True, timeout=self.options.limit
        )
        wall = time.perf_counter() - begin
        found: Found = json.loads(done.stdout or "{}")
        shown = " ".join(map(str, arguments)).replace(f"{version.root}/", "").replace("-m dsv4q", "dsv4q", 1)
        return {**found, "command": shown, "wall": wall}

    def dsv4q(self, version: Version, *arguments: object) -> Found:
        return self.python(version, "-m", "dsv4q", *arguments, "--json")

    def script(self, version: Version, script: str, *arguments: object, ranks: int = 1) -> Found:
        return self.python(version, version.root / "scripts" / script, *arguments, ranks=ranks)

    def disk(self) -> float:
        """GB/s of plain writes with fsync into WORK, of the better number of threads."""
        nbytes = int(self.options.gigabytes * 1e9)
        return max(write_speed(self.options.work, nbytes, threads) for threads in (4, 8))

    def out(self, name: str) -> Path:
        return fresh(self.options.work / name)

    # ------------------------------------------------------------------------------------------ records

    def keep(self, line: str, version: Version, run: Found, **figures: Any) -> None:
        """Note a measurement and print it."""
        one = {"line": line, "version": version.name, "command": run["command"], "wall": round(run["wall"], 2)}
        self.found.append({**one, **{name: rounded(value) for name, value in figures.items()}})
        print(json.dumps(self.found[-1]), flush=True)
        if self.options.json:  # after each one, for a later one may not come to its end
            self.options.json.write_text(json.dumps(self.found, indent=1))


def stored_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return round(value, 3) if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------ lines


def quantizing(line: str, bench: Bench, version: Version, source: Path, *flags: object, ranks: int = 1) -> None:
    """One run of bench_dsv4q.py: seconds of each layer, peaks, and the digests of its blocks."""
    options = bench.options
    arguments = ("--micro-batch", 8, "--samples", options.samples, "--length", options.length)
    files = "--sink" not in flags
    before = bench.disk() if files else None
    out = bench.out("artifact")
    run = bench.script(version, "bench_dsv4q.py", source, out, *arguments, "--device", options.device, *flags,
                       ranks=ranks)  # fmt: skip
    fresh(out)
    walls = [layer["wall"] for layer in layers_of(run)]
    # Blocks become durable several at once, whose shard is whole then: only over many is that a rate.
    seconds = steady(walls if files else walls[-4:])
    figures: Found = {"layers": walls, "seconds_a_layer": seconds, "peak": run["peak_memory"]}
    if before is not None:
        rate = run["layer"]["bytes_out"] / 1e9 / seconds
        disk = [before, bench.disk()]
        figures |= {"gigabytes_per_second": rate, "disk": disk, "share": [rate / speed for speed in disk]}
    bench.keep(line, version, run, **figures, digests={k: v[:12] for k, v in run["digests"].items()})


def sink(bench: Bench, version: Version) -> None:
    quantizing("sink", bench, version, bench.source(bench.size_of(version)), "--sink")


def gpu_memory(bench: Bench, version: Version) -> None:
    quantizing("gpu-memory", bench, version, bench.source(bench.options.layers), "--sink", "--gpu-memory", "16GB")


def files(bench: Bench, version: Version) -> None:
    quantizing("files", bench, version, bench.source(bench.size_of(version)))


def bf16(bench: Bench, version: Version) -> None:
    made: Path = bench.options.made / "bf16"
    if not made.exists():
        write_source(made, dimensions(bench.options.width, 4), bench.options.device, native=False)
    quantizing("bf16", bench, version, made, "--sink")
    if version == bench.versions[-1]:
        shutil.rmtree(made)


def two_ranks(bench: Bench, version: Version) -> None:
    """Sink and files on one GPU and on two, all with all cores; of an older version on two."""
    if bench.options.device.startswith("cuda") and torch.cuda.device_count() < 2:
        print(json.dumps({"line": "ranks", "left_out": "this machine has one GPU"}), flush=True)
        return
    limited = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    try:
        source = bench.source(bench.size_of(version))
        for what, flags in (("sink", ("--sink",)), ("files", ())):
            for count in (1, 2) if version == bench.now else (2,):
                quantizing(f"ranks, {count}, {what}", bench, version, source, *flags, ranks=count)
    finally:
        os.sched_setaffinity(0, limited)


def by_size(
    line: str, bench: Bench, version: Version, sizes: Sequence[int], run: Callable[[int], Found], nbytes: str | None
) -> None:
    """The same command on checkpoints of different numbers of layers: what one more layer takes.

    Of 0 layers, which are the narrow one, what the whole command takes.

    Args:
        nbytes: of the result's keys that which has the bytes read or written, if there is one.
    """
    runs = [(size, run(size)) for size in sorted(set(sizes))]
    many, last = runs[-1]
    few, first = runs[0] if len(runs) > 1 else (0, {})
    seconds = last["seconds"] - first.get("seconds", 0.0)
    figures: Found = {"layers": [size for size, _ in runs], "seconds": [one["seconds"] for _, one in runs]}
    figures |= {"walls": [one["wall"] for _, one in runs]}
    if many:
        figures["seconds_a_layer"] = seconds / (many - few)
    if nbytes is not None:
        figures["gigabytes_per_second"] = (last[nbytes] - first.get(nbytes, 0)) / 1e9 / seconds
    bench.keep(line, version, last, **figures)


def judging(line: str, bench: Bench, version: Version, sizes: Sequence[int], device: str) -> None:
    def run(layers: int) -> Found:
        pair = (bench.artifact(layers), "--source", bench.source(layers))
        found = bench.dsv4q(version, "verify-shards", *pair, "--deep", "--device", device)
        if found["differences"]:
            sys.exit(f"{line}: {found['differences'][0]}")
        return {**found, "bytes_read": sum(map(stored_bytes, (pair[0], pair[2])))}

    by_size(line, bench, version, sizes, run, "bytes_read")


def judge(bench: Bench, version: Version) -> None:
    sizes = (bench.options.few, bench.options.layers) if version == bench.now else (1, bench.options.few)
    judging("judge", bench, version, sizes, bench.options.device)


def judge_cpu(bench: Bench, version: Version) -> None:
    judging("judge-cpu", bench, version, (1, 3) if version == bench.now else (0,), "cpu")


def convert_cpu(bench: Bench, version: Version) -> None:
    def run(layers: int) -> Found:
        out = bench.out("artifact")
        config = bench.config(version, layers)
        found = bench.dsv4q(version, "quantize", bench.source(layers), out, "--config", config, "--device", "cpu")
        nbytes = stored_bytes(out)
        fresh(out)
        return {**found, "seconds": found["wall"], "bytes": nbytes}

    by_size("convert-cpu", bench, version, (1, 3) if version == bench.now else (0,), run, "bytes")


def dequantizing(line: str, bench: Bench, version: Version, layers: int, *flags: object) -> None:
    out, before = bench.out("bf16"), bench.disk()
    run = bench.dsv4q(version, "dequantize", bench.source(layers), out, *flags)
    fresh(out)
    disk = [before, bench.disk()]
    rate = run["bytes"] / 1e9 / run["seconds"]
    figures = {"gigabytes": run["bytes"] / 1e9, "seconds": run["seconds"], "gigabytes_per_second": rate}
    bench.keep(line, version, run, **figures, disk=disk, share=[rate / speed for speed in disk])


def dequantize(bench: Bench, version: Version) -> None:
    if version == bench.now:
        for _ in range(2):
            dequantizing("dequantize", bench, version, 2, "--device", bench.options.device)
    else:
        dequantizing("dequantize", bench, version, 1)


def dequantize_cpu(bench: Bench, version: Version) -> None:
    dequantizing("dequantize-cpu", bench, version, 1, "--device", "cpu")


def evaluate(bench: Bench, version: Version) -> None:
    """Seconds a layer are of both models: half of them are one model's."""
    options = bench.options

    def run(layers: int) -> Found:
        data = ("--data", bench.source(layers) / "chat_samples.jsonl", "--samples", options.samples)
        pair = (bench.artifact(layers), "--reference", bench.source(layers), "--device", options.device)
        return bench.dsv4q(version, "eval", *pair, *data, "--length", options.length)

    by_size("eval", bench, version, (options.few, options.layers) if version == bench.now else (1, 2), run, None)


def rehearsing(bench: Bench, version: Version) -> tuple[Path, tuple[object, ...]]:
    out = bench.out("rehearsal")
    options = ("--native", "--no-judge") if version.rehearses_native else ()
    config = ("--config", version.configs / "nvfp4-fp8-mtp.yaml")
    return out, ("rehearse", out, *config, *bench.model(), *options, "--device", bench.options.device, "--json")


def start(bench: Bench, version: Version) -> None:
    """Its moments are on stderr."""
    out, arguments = rehearsing(bench, version)
    bench.keep("start", version, bench.python(version, HERE / "bench_start.py", "--stop", *arguments))
    fresh(out)


def rehearse(bench: Bench, version: Version) -> None:
    """Its beginning is on stderr. The disk alone is measured around that of this version only."""
    disk = [writes(bench, "1/2")] if version == bench.now else []
    _, arguments = rehearsing(bench, version)
    run = bench.python(version, HERE / "bench_start.py", *arguments)
    layers = layers_of(run["report"])
    walls = [layer["wall"] for layer in layers]
    stages = {name: sum(layer[name] for layer in layers) for name in layers[-1]}
    figures: Found = {"seconds": run["seconds"], "peak": run["peak"], "layers": walls, "stages": stages}
    figures["done_at"] = {block["block"]: block["seconds"].get("done_at") for block in run["report"]["blocks"]}
    if version == bench.now:
        disk.append(writes(bench, "2/2"))
        figures |= {"disk": disk, "share": [run["wall"] / sum(disk)]}
    bench.keep("rehearse", version, run, **figures)


def writes(bench: Bench, part: str) -> float:
    """Seconds that the disk alone takes for a part of the artifact."""
    config = ("--config", bench.now.configs / "nvfp4-fp8-mtp.yaml")
    out = bench.out("writes")
    run = bench.script(bench.now, "bench_writes.py", out, "--whole", "--part", part, *config, *bench.model())
    seconds = sum(run["seconds"])
    figures = {name: run[name] for name in ("gigabytes", "gigabytes_per_second", "deleting", "waited_for_it")}
    bench.keep("writes", bench.now, run, seconds=seconds, blocks=run["seconds"], **figures)
    return seconds


Line = Callable[[Bench, Version], None]

LINES: dict[str, tuple[Line, bool]] = {
    "sink": (sink, True), "gpu-memory": (gpu_memory, False), "files": (files, True), "bf16": (bf16, True),
    "ranks": (two_ranks, True), "judge": (judge, True), "judge-cpu": (judge_cpu, True),
    "convert-cpu": (convert_cpu, True), "dequantize": (dequantize, True), "dequantize-cpu": (dequantize_cpu, False),
    "eval": (evaluate, True), "start": (start, True), "rehearse": (rehearse, True),
}  # fmt: skip
"""Each with whether an older version is measured as well."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--made", type=Path, required=True, help="where source and artifact are or are to be made")
    parser.add_argument("--only", default=",".join(LINES), help="comma list of lines")
    parser.add_argument("--before", type=Path, help="checkout of an older version")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--few", type=int, default=3)
    parser.add_argument("--width", choices=("full", "toy"), default="full")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cores", type=int, help="of this machine's, the first so many")
    parser.add_argument(
        "--gigabytes", type=float, default=6.0, help="written to find what the disk takes: best what a line writes"
    )
    parser.add_argument("--touch", type=float, default=0.0, help="GB of memory to be used once before")
    parser.add_argument("--limit", type=float, default=250.0, help="seconds that one command may take")
    parser.add_argument("--json", type=Path, help="everything that was measured, for machines")
    options = parser.parse_args()
    options.lines = options.only.split(",")
    unknown = set(options.lines) - set(LINES)
    if unknown:
        parser.error(f"--only knows {', '.join(LINES)}, not {', '.join(sorted(unknown))}")
    return options


def measurements(bench: Bench) -> Iterator[tuple[str, Version]]:
    """Lines and versions in order: the two of a line follow each other."""
    for line in bench.options.lines:
        for version in bench.versions:
            if version == bench.now or LINES[line][1]:
                yield line, version


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.cores:
        os.sched_setaffinity(0, sorted(ALL_CORES)[: options.cores])
    if options.touch:
        options.made.mkdir(parents=True, exist_ok=True)
        threads = len(os.sched_getaffinity(0))
        speeds = rounded([write_speed(options.made, int(options.touch * 1e9), threads) for _ in range(2)])
        print(json.dumps({"touched, GB": options.touch, "GB/s, first and second time": speeds}), flush=True)
    bench = Bench(options)
    print(json.dumps(machine("bench_commands.py", options.device)), flush=True)
    failed = []
    for line, version in measurements(bench):
        try:
            LINES[line][0](bench, version)
        except FAILED as error:
            failed.append(f"{line} of {version.name}")
            said = error.stdout if isinstance(error.stdout, str) else ""
            print(json.dumps({"line": line, "version": version.name, "failed": f"{error} {said[-800:]}"}), flush=True)
    rows = [
        [one["line"], one["version"], one.get("seconds_a_layer"), one.get("gigabytes_per_second"), one["wall"]]
        for one in bench.found
    ]
    print("\n" + table(["line", "version", "s a layer", "GB/s", "command, s"], rows))
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
