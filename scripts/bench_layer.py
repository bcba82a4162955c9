"""Full-width DeepSeek-V4 layers through `dsv4q quantize`: seconds per stage, peaks, and the machine's own ceilings.

    python scripts/bench_layer.py WORK [--layers 3] [--samples 64] [--length 512] [--micro-batch 8] [--device cuda]
                                  [--config configs/nvfp4-fp8-mtp.yaml] [--verify]

Makes a source of K layers of the real width in WORK/source (hidden 4096, 256 experts of 2048; 13.2 GB of BF16 each;
weights on the MXFP4 and FP8 grids, made on the device), unless it is there, quantizes it into WORK/artifact and prints
a table. Layers are sliding, ratio 4 and ratio 128 in turn, the first of them routed by hash.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4q.calibration.encode import fp8_block_decode, fp8_block_encode
from dsv4q.calibration.exact import fp8_block_scales, round_e2m1
from dsv4q.checkpoint.layout import Dims, Role, TensorSpec
from dsv4q.config import load_config, parse_config
from dsv4q.console import Console, Mode, human_bytes
from dsv4q.quantize import Job, quantize
from dsv4q.toy import RANDOM, Form, ToyConfig, random_values, write_toy


def wide(layers: int) -> ToyConfig:
    """The real width with a small vocabulary and no MTP block, which is only copied."""
    return ToyConfig(
        hidden_size=4096, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=6,
        num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024,
        index_n_heads=64, index_head_dim=128, index_topk=512, sliding_window=128,
        compress_ratios=tuple((0, 4, 128)[i % 3] for i in range(layers)), num_hash_layers=1,
        num_nextn_predict_layers=0, shards=3 * layers,
    )  # fmt: skip


def on_the_grid(device: str) -> Form:
    """What `write_toy` is to write: BF16, large linears made on the device, rounded to MXFP4 or FP8 and back."""

    def values(spec: TensorSpec, dims: Dims, seed: int) -> tuple[Tensor, ...]:
        if spec.role not in (Role.ROUTED_EXPERT, Role.ATTENTION, Role.SHARED_EXPERT):
            return (random_values(spec, dims, seed),)
        key = int.from_bytes(hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(key)
        weight = torch.randn(spec.shape, generator=generator, device=device) / spec.shape[1] ** 0.5
        if spec.role == Role.ROUTED_EXPERT:
            blocks = weight.reshape(spec.shape[0], -1, 32)
            scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(dim=-1, keepdim=True) / 6)))
            weight = (round_e2m1(blocks / scale) * scale).reshape(spec.shape)
        else:
            scale = fp8_block_scales(weight)
            weight = fp8_block_decode(fp8_block_encode(weight, scale), scale)
        return (weight.to(torch.bfloat16).cpu(),)

    return replace(RANDOM, values=values)


def ceilings(work: Path, device: str) -> dict[str, float]:
    """GB/s that this machine gives: reading from the page cache, writing with fsync, copies to the device and back."""
    found: dict[str, float] = {}
    data = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8)
    path = work / "ceiling"
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        file.write(data.numpy().data)
        os.fsync(file.fileno())
    found["write, fsync"] = data.numel() / 1e9 / (time.perf_counter() - begin)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        view = memoryview(bytearray(data.numel()))
        while view:
            view = view[file.readinto(view) :]
    found["read, page cache, one thread"] = data.numel() / 1e9 / (time.perf_counter() - begin)
    path.unlink()
    if device.startswith("cuda"):
        pinned = data.pin_memory()
        there = pinned.to(device)
        for name, copy in (
            ("pinned host to device", lambda: there.copy_(pinned)),
            ("device to pinned host", lambda: pinned.copy_(there)),
        ):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            copy()
            torch.cuda.synchronize()
            found[name] = data.numel() / 1e9 / (time.perf_counter() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, default=Path("configs/nvfp4-fp8-mtp.yaml"))
    parser.add_argument("--verify", action="store_true", help="judge the artifact against the source afterwards")
    options = parser.parse_args()
    source, out = options.work / "source", options.work / "artifact"
    if not (source / "config.json").is_file():
        begin = time.perf_counter()
        write_toy(source, wide(options.layers), form=on_the_grid(options.device))
        print(f"source of {options.layers} layers made in {time.perf_counter() - begin:.1f} s", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    report = quantize(Job(source, out, config(options), device=options.device), Console(Mode.QUIET))
    show(report, ceilings(options.work, options.device))
    if options.verify:
        from dsv4q.checkpoint.verify import verify

        begin = time.perf_counter()
        result = verify(out, source=source, deep=True, progress=None, device=options.device)
        print(f"verified in {time.perf_counter() - begin:.1f} s: {len(result.differences)} differences")
        for difference in result.differences[:5]:
            print(difference)


def config(options: argparse.Namespace) -> Any:
    """The chosen config on the toy's samples, without the MTP block that the source lacks."""
    raw = load_config(options.config).model_dump(mode="json")
    if raw["calibration"]:
        raw["calibration"] |= {
            "dataset": "chat_samples.jsonl", "split": None, "samples": options.samples, "max_length": options.length,
            "micro_batch": options.micro_batch,
        }  # fmt: skip
    raw["mtp"] = {"keep": False, "shared_head_copies": False}
    raw["output"]["shards"] = 3
    return parse_config(raw)


def show(report: dict[str, Any], found: dict[str, float]) -> None:
    stages = sorted({stage for block in report["blocks"] for stage in block["seconds"]})
    print("| block | " + " | ".join(stages) + " | all |\n|---" * 1 + "|---" * (len(stages) + 1) + "|")
    for block in report["blocks"]:
        cells = [f"{block['seconds'].get(stage, 0):.2f}" for stage in stages]
        total = sum(seconds for stage, seconds in block["seconds"].items() if stage != "sync")
        print(f"| {block['block']} | " + " | ".join(cells) + f" | {total:.2f} |")
    print(f"whole run {report['seconds']['this_process']:.1f} s; peak " + ", ".join(
        f"{name} {human_bytes(n)}" for name, n in report["peak_memory"].items()))  # fmt: skip
    for role, errors in report["errors"].items():
        print(f"{role}: {errors['exact']} of {errors['tensors']} exact, relative error {errors['relative_error']:.4%}")
    print("; ".join(f"{name} {speed:.1f} GB/s" for name, speed in found.items()), flush=True)


if __name__ == "__main__":
    main()
