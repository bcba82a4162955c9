"""A native toy, what quantize makes of it, and both layouts of that, for tests of `dsv4q export`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv4q.checkpoint.files import INDEX
from dsv4q.config import load_config
from dsv4q.console import Console, Mode
from dsv4q.export.job import Export
from dsv4q.export.story import export
from dsv4q.foreign.modelopt import COMPRESSED, MODELOPT
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.quantize import Job, quantize
from runs import CONFIGS, at_toy_size, finished_files

TINY = ToyConfig(
    hidden_size=128, n_routed_experts=2, compress_ratios=(4, 128), num_hash_layers=1, vocab_size=300, shards=3
)
EXPERT = "layers.0.ffn.experts.1.w2"
Tensors = dict[str, torch.Tensor]


def native_toy(root: Path, toy: ToyConfig = TINY, seed: int = 0) -> Path:
    return write_toy(root, toy, seed, native_form()).out


def quantized(source: Path, out: Path, config: str = "toy", **draft: object) -> Path:
    parsed = at_toy_size(load_config(CONFIGS / f"{config}.yaml"))
    parsed = parsed.model_copy(update={"draft": parsed.draft.model_copy(update=draft)})
    quantize(Job(source, out, parsed, device="cpu"), Console(Mode.QUIET))
    return out


def run(job: Export) -> dict[str, Any]:
    return export(job, Console(Mode.QUIET))


def to_modelopt(artifact: Path, source: Path, out: Path) -> Path:
    run(Export(artifact, out, source, MODELOPT))
    return out


def to_compressed(artifact: Path, source: Path, out: Path) -> Path:
    run(Export(artifact, out, source, COMPRESSED))
    return out


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in finished_files(out)}


def tensors(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def one_file_a_block(native: Path, to: Path) -> Path:
    """The same checkpoint with a file for each block, as DeepSeek publishes it."""
    shutil.copytree(native, to, ignore=shutil.ignore_patterns("model*"))
    every = tensors(native)
    blocks = {name: ".".join(name.split(".")[: 2 if name.startswith(("layers.", "mtp.")) else 1]) for name in every}
    blocks = {name: block if "." in block or block == "embed" else "head" for name, block in blocks.items()}
    order = [
        *dict.fromkeys(sorted(blocks.values(), key=lambda b: ("embed", "layers", "head", "mtp").index(b.split(".")[0])))
    ]
    files = {block: f"model-{i:05d}-of-{len(order):05d}.safetensors" for i, block in enumerate(order, 1)}
    for block, file in files.items():
        save_file({name: tensor for name, tensor in every.items() if blocks[name] == block}, to / file)
        (to / file).chmod(0o644)
    (to / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {n: files[b] for n, b in blocks.items()}}))
    return to
