"""A benchmark's source: full-width layers on the MXFP4 and FP8 grids, made on the device, written by several threads.

Each layer lies in files of its own, so a source of fewer layers is made of the same files by hard links.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import torch
from torch import Tensor

from dsv4q.checkpoint.native import MXFP4, release_form
from dsv4q.checkpoint.shards import PlannedShard, PlannedTensor, ShardPlan, balanced_shards
from dsv4q.checkpoint.source import scan
from dsv4q.formats.dtypes import E2M1_VALUES
from dsv4q.formats.encode import fp8_block_encode
from dsv4q.formats.exact import fp8_block_scales, round_e2m1
from dsv4q.formats.native import E8M0_BIAS, fp8_to_bf16, mxfp4_to_bf16
from dsv4q.layout import Dims, TensorSpec, source_tensors
from dsv4q.made_up.native import native_form, stored_specs
from dsv4q.made_up.toy import ToyConfig, random_values, write_toy
from dsv4q.made_up.words import chat_samples

INDEX = "model.safetensors.index.json"
CONVERSATIONS = 1 << 12
"""Enough for 512 samples of 2,048 tokens."""
FILES_OF_A_LAYER = 8
"""Threads that write to one file wait for each other, so there are as many files as threads."""


def dimensions(width: str, layers: int) -> ToyConfig:
    """Layers are sliding, ratio 4 and ratio 128 in turn, the first of them routed by hash; no MTP, which is copied.

    Args:
        width: `full`, that of DeepSeek-V4-Flash (13.2 GB of BF16 a layer) with a small vocabulary; `pro`, that of
            DeepSeek-V4-Pro (51 GB), which has no sliding layers; or `toy`.
    """
    if width == "pro":
        flash = dimensions("full", layers)
        return replace(
            flash, hidden_size=7168, moe_intermediate_size=3072, n_routed_experts=384, num_attention_heads=128,
            q_lora_rank=1536, o_groups=16, index_topk=1024,
            compress_ratios=tuple((4, 128)[i % 2] for i in range(layers)),
        )  # fmt: skip
    ratios = tuple((0, 4, 128)[i % 3] for i in range(layers))
    if width == "toy":
        return ToyConfig(compress_ratios=ratios, num_hash_layers=1, num_nextn_predict_layers=0)
    return ToyConfig(
        hidden_size=4096, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=6,
        num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024,
        index_n_heads=64, index_head_dim=128, index_topk=512, sliding_window=128, compress_ratios=ratios,
        num_hash_layers=1, num_nextn_predict_layers=0,
    )  # fmt: skip


def values(spec: TensorSpec, dims: Dims, device: str, *, native: bool = False) -> tuple[Tensor, ...]:
    """One tensor on `device` or the CPU: a function of name, shape and kind of device. Large linears are on a grid.

    Returns:
        The tensor as BF16; with `native`, of what the release quantizes, codes and E8M0 scales of the same values.
    """
    form = release_form(spec)
    if form is None:
        return (random_values(spec, dims, seed=0),)
    key = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:7], "little")
    generator = torch.Generator(device).manual_seed(key)
    weight = torch.randn(spec.shape, generator=generator, device=device) / spec.shape[1] ** 0.5
    codes, scale = _mxfp4(weight) if form == MXFP4 else _fp8(weight)
    if native:
        return codes, scale
    return ((mxfp4_to_bf16 if form == MXFP4 else fp8_to_bf16)(codes, scale, spec.name),)


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """I8 [out, in/2] and E8M0 [out, in/32] of the nearest values."""
    blocks = weight.reshape(weight.shape[0], -1, 32)
    exponent = torch.ceil(torch.log2(blocks.abs().amax(dim=-1, keepdim=True) / 6))
    rounded = round_e2m1(blocks / torch.exp2(exponent)).reshape(weight.shape)
    grid = torch.tensor(E2M1_VALUES[:8], device=weight.device)
    codes = torch.searchsorted(grid, rounded.abs()).to(torch.uint8) | torch.signbit(rounded).to(torch.uint8) << 3
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8), _e8m0(exponent.squeeze(-1))


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """F8_E4M3 [out, in] and E8M0 by 128x128 of the nearest values."""
    scale = fp8_block_scales(weight)
    return fp8_block_encode(weight, scale), _e8m0(torch.log2(scale))


def _e8m0(exponent: Tensor) -> Tensor:
    return (exponent + E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def write_source(out: Path, toy: ToyConfig, device: str, *, native: bool = False) -> None:
    """Write the checkpoint, BF16 or in DeepSeek's own layout; `out` must not exist.

    Nothing is synced: a benchmark reads it from the page cache.
    """
    with tempfile.TemporaryDirectory() as small:
        # tokenizer, chat samples and the like, of a checkpoint with the same vocabulary and one tiny layer
        write_toy(Path(small, "toy"), ToyConfig(compress_ratios=(0,), num_hash_layers=0, vocab_size=toy.vocab_size))
        copytree(Path(small, "toy"), out, ignore=ignore_patterns("*.safetensors", INDEX))
    with (out / "chat_samples.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in chat_samples(CONVERSATIONS))
    _write_json(out / "config.json", {**toy.as_config_json(), **(native_form().config if native else {})})
    shards = _shards(source_tensors(toy.dims), native)
    threads = FILES_OF_A_LAYER if device.startswith("cuda") else 1
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda shard: _write_shard(out, shard, toy.dims, device, native), shards))
    _write_json(out / INDEX, ShardPlan(tuple(shards)).index())


def first_layers(source: Path, out: Path, layers: int) -> Path:
    """A checkpoint of the first layers of `source`, of the same files; `out` is on the same file system."""
    if out.exists():
        return out
    copytree(source, out, ignore=ignore_patterns("*.safetensors", INDEX, "config.json"))
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    ratios = config["compress_ratios"][:layers]
    _write_json(out / "config.json", {**config, "compress_ratios": ratios, "num_hidden_layers": layers})
    dropped = tuple(f"layers.{i}." for i in range(layers, config["num_hidden_layers"]))
    index = json.loads((source / INDEX).read_text())["weight_map"]
    kept = {name: file for name, file in index.items() if not name.startswith(dropped or ("-",))}
    for file in set(kept.values()):
        os.link(source / file, out / file)
    stored = scan(source).tensors
    total = sum(stored[name].nbytes for name in kept)
    _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": kept})
    return out


def _shards(specs: Sequence[TensorSpec], native: bool) -> list[PlannedShard]:
    """Each block's tensors by name in files of about equal size; in a file by dtype, then by name.

    So safetensors' own writer has them, and who reads experts together finds few side by side: 0, 1, 10, 100, 101, ...
    """
    shards = []
    for block in dict.fromkeys(spec.block for spec in specs):
        tensors = [
            PlannedTensor(part.name, part.dtype, part.shape, spec, False, block)
            for spec in specs
            for part in (stored_specs(spec) if native else (spec,))
            if spec.block == block
        ]
        files = min(FILES_OF_A_LAYER if block.startswith("layers.") else 1, len(tensors))
        tensors.sort(key=lambda t: t.name)
        for i, cut in enumerate(balanced_shards(tensors, files)):
            by_dtype = sorted(cut.tensors, key=lambda t: (t.dtype, t.name))
            shards.append(PlannedShard.of(f"{block}-{i}.safetensors", by_dtype))
    return shards


def _write_shard(out: Path, shard: PlannedShard, dims: Dims, device: str, native: bool) -> None:
    with (out / shard.file).open("wb", buffering=0) as file:
        file.write(shard.header)
        for tensor, _ in shard.offsets():
            parts = values(tensor.spec, dims, device, native=native)
            made = parts[tensor.name.endswith(".scale") and len(parts) > 1]
            if made.is_cuda:
                made = torch.empty(made.shape, dtype=made.dtype, pin_memory=True).copy_(made)
            view = memoryview(made.contiguous().reshape(-1).view(torch.uint8).numpy())
            while view:
                view = view[file.write(view) :]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
