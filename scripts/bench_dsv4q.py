"""`dsv4q quantize` on a benchmark's source, in a process of its own. Prints one JSON object.

    python scripts/bench_dsv4q.py SOURCE OUT [--sink] [--profile] [--config C] [--samples 64] [--length 512]
                                  [--micro-batch 8] [--device cuda] [--gpu-memory BYTES]

Several ranks: start it with torchrun; rank 0 prints.

With `--sink` the bytes are dropped where they would be written: everything is computed and copied to the host, no
shard is made. With `--modules` the routed experts take the slow way, linear by linear under llmcompressor's hooks. With
`--profile` the last layer but one, of three or more, is watched by torch.profiler.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.native import open_source
from dsv4q.checkpoint.writer import Data, ShardWriter
from dsv4q.config import Config, load_config, parse_config
from dsv4q.console import Console, Mode, Progress, bytes_of
from dsv4q.host import is_first_rank, peak_memory
from dsv4q.layout import Role
from dsv4q.plan import plan as planning
from dsv4q.plan.plan import Plan
from dsv4q.quantize import Job, begin, prepare, quantize
from dsv4q.report.build import build_report
from dsv4q.run.ranks import Ranks, ranks
from dsv4q.run.run import run_blocks

CONFIG = Path(__file__).parent.parent / "src" / "dsv4q" / "configs" / "nvfp4-fp8-mtp.yaml"
SHARDS = 3


class Discard(ShardWriter):
    """A writer that keeps nothing; what it is given is in host memory by then."""

    def put_all(self, tensors: Iterable[tuple[str, Data]]) -> None:
        for _name, data in tensors:
            memoryview(data)

    def sync(self, block: str) -> dict[str, str]:
        return {}

    def finish_blocks(self, blocks: Iterable[str]) -> list[str]:
        return []


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every run needs to know, stock's too."""
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpu-memory", type=bytes_of, help="bytes of the GPU that the run may take")


def job_of(options: argparse.Namespace) -> Job:
    """The run that the options ask for."""
    return Job(options.source, options.out, config_of(options), options.device, options.gpu_memory)


def config_of(options: argparse.Namespace) -> Config:
    """The chosen config on the source's own samples, without the MTP block that the source lacks."""
    raw = load_config(options.config).model_dump(mode="json")
    if raw["calibration"]:
        raw["calibration"] |= {
            "dataset": "chat_samples.jsonl", "split": None, "samples": options.samples, "max_length": options.length,
            "micro_batch": options.micro_batch,
        }  # fmt: skip
    raw["draft"] = {"keep": False}
    raw["output"]["shards"] = SHARDS
    return parse_config(raw)


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def finish(result: dict[str, Any]) -> None:
    """Print the result with this process' peaks, on one line."""
    peaks = peak_memory()
    if torch.cuda.is_available():
        peaks["gpu_reserved"] = int(torch.cuda.max_memory_reserved())
    print(json.dumps({**result, "peak_memory": peaks}), flush=True)


def layer_work(plan: Plan) -> dict[str, float]:
    """Bytes in and out of a mean layer, and the arithmetic that its linears need.

    2 operations a weight and token: every linear but the routed experts on all tokens; w1 and w3 of the routed experts
    on all tokens where the config sends all tokens to all experts, else on the routed ones; w2, whose output only the
    router's choice needs, on the routed ones. Attention scores are not counted.
    """
    tokens, dims = plan.estimate.calibration_tokens, plan.dims
    blocks = [block for block in plan.blocks if block.startswith("layers.")]
    share = dims.experts_per_token / dims.experts
    wide = 1.0 if plan.config.activations.experts == "all" else share
    operations = 0.0
    for spec in plan.source_specs:
        if spec.block not in blocks or len(spec.shape) != 2 or spec.dtype == "I64" or spec.name.endswith(".ape"):
            continue
        routed = wide if not spec.name.endswith("w2.weight") else share
        operations += 2 * tokens * math.prod(spec.shape) * (routed if spec.role == Role.ROUTED_EXPERT else 1)
    return {
        "bytes_in": sum(s.nbytes for s in plan.source_specs if s.block in blocks) / len(blocks),
        "bytes_out": sum(t.nbytes for block in blocks for t in plan.block_tensors(block)) / len(blocks),
        "operations": operations / len(blocks),
    }


# ------------------------------------------------------------------------------------------------ profile


@dataclass(frozen=True)
class WatchingConsole(Console):
    """A silent console that calls `began` with each block that the run begins, on the run's thread."""

    mode: Mode = Mode.QUIET
    began: Callable[[str], None] = lambda _block: None

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "B") -> Iterator[Progress]:
        def show(progress: Progress) -> None:
            self.began(progress.description)

        yield Progress(description, total, unit, show)


@dataclass
class LayerProfile:
    """torch.profiler from the moment that one block begins to the moment that the next does."""

    block: str
    gpu: bool
    result: dict[str, Any] = field(default_factory=dict)
    _running: torch.profiler.profile | None = None

    def began(self, block: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a block that is only copied, ahead of the computation
        if block == self.block and self._running is None and not self.result:
            activity = torch.profiler.ProfilerActivity
            self._running = torch.profiler.profile(activities=[activity.CUDA if self.gpu else activity.CPU])
            self._running.start()
        elif block != self.block and self._running is not None:
            if self.gpu:
                torch.cuda.synchronize()
            self._running.stop()
            self.result = summary(self._running, self.gpu)
            self._running = None


def summary(profile: torch.profiler.profile, gpu: bool) -> dict[str, Any]:
    """Time by kernel (of a CPU: by operator), the largest first, and how long the GPU had none to run, in seconds."""
    events = [e for e in profile.events() or [] if (e.device_type == torch.autograd.DeviceType.CUDA) == gpu]
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        # a kernel's time is its range; an operator's is without those that it calls
        times[event.name].append((event.time_range.elapsed_us() if gpu else event.self_cpu_time_total) / 1e6)
    top = sorted(times.items(), key=lambda item: -sum(item[1]))
    found: dict[str, Any] = {
        "kernels": [{"name": name, "calls": len(spent), "seconds": sum(spent)} for name, spent in top[:20]]
    }
    if gpu and events:
        kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
        window = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
        found |= {"window": window / 1e6, "busy": covered(events) / 1e6, "computing": covered(kernels) / 1e6}
    return found


def covered(events: Iterable[Any]) -> float:
    """Length of the union of the events' ranges, in the profiler's unit."""
    total, reached = 0.0, -math.inf
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def blocks_alone(job: Job, console: Console, here: Ranks) -> dict[str, Any]:
    """A run of the job from its start with the bytes thrown away; returns the report. Nothing is verified."""
    with open_source(job.source) as source:
        run = replace(begin(job, prepare(job), source, here), make_writer=Discard)
        here.wait_for_all()
        if here.is_leader:
            journal = Journal.open(job.out, run.identity(), resume=False)
        done = here.from_leader({})
        if not here.is_leader:
            journal = Journal.follow(job.out, done)
        try:
            peaks = run_blocks(run, journal, console)
            if here.is_leader:
                journal.remove()
        finally:
            journal.close()
    seconds = time.time() - run.begin
    return build_report(run.plan, journal.done, run.identity(), run.data, seconds=seconds, peaks=peaks)


@dataclass
class Received:
    """Counts the bytes that this rank gets of others."""

    rank: int
    nbytes: int = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        real = dist.broadcast

        def broadcast(tensor: torch.Tensor, src: int, *arguments: Any, **keywords: Any) -> Any:
            self.nbytes += tensor.nbytes * (src != self.rank)
            return real(tensor, src, *arguments, **keywords)

        dist.broadcast = broadcast
        try:
            yield
        finally:
            dist.broadcast = real


def sunk(job: Job, console: Console) -> dict[str, Any]:
    """The report of `blocks_alone`, with the bytes that rank 0 received of the others."""
    with ranks(job.device, console) as here:
        received = Received(here.share.rank)
        with received.counting():
            report = blocks_alone(job, console, here)
    return report | {"received_bytes": received.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--modules", action="store_true", help="experts as modules under llmcompressor's hooks")
    options = parser.parse_args()
    job = job_of(options)
    plan = prepare(job)
    profile = LayerProfile(f"layers.{max(plan.dims.layers - 2, 0)}", options.device.startswith("cuda"))
    console = WatchingConsole(began=profile.began) if options.profile else Console(Mode.QUIET)
    if options.modules:
        planning._experts_in_stacks = lambda *_: False
    report = sunk(job, console) if options.sink else quantize(job, console)
    if not is_first_rank():
        return
    finish(
        {
            "ranks": report["ranks"],
            "received_bytes": report.get("received_bytes"),
            "blocks": [
                {"block": b["block"], "seconds": b["seconds"], "ranks": [rank["seconds"] for rank in b["ranks"]]}
                for b in report["blocks"]
            ],
            "digests": {b["block"]: b["digest"] for b in report["blocks"]},
            "errors": report["errors"],
            "seconds": report["seconds"]["this_process"],
            "layer": layer_work(plan),
            "profile": profile.result,
        }
    )


if __name__ == "__main__":
    main()
