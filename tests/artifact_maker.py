"""A tiny complete source and an artifact in contract form, made without any code of the package's own writer.

The numbers come from compressed-tensors' calculators and compressors, the files from safetensors, the expected
names from the layout. Defects are planted with `edit`, `edit_config` and `edit_json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, NaiveQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import FP8_BLOCK, NVFP4
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4q.layout import Dims, TensorSpec, source_tensors

INDEX = "model.safetensors.index.json"
Tensors = dict[str, Tensor]
INT_GROUP = 32

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": 64,
    "vocab_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 40,
    "q_lora_rank": 48,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "hc_mult": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
    "num_nextn_predict_layers": 1,
}

ATTENTION_TARGET = r"re:.*\.(attn|self_attn)\.(wq_a|wq_b|wkv|wo_a|wo_b|q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"
EXPERT_TARGET = r"re:.*\.(ffn|mlp)\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
_ATTENTION_GROUP = {
    "targets": [ATTENTION_TARGET],
    "format": "float-quantized",
    "weights": {**_FP8, "strategy": "block", "block_structure": [128, 128], "dynamic": False},
    "input_activations": {**_FP8, "strategy": "group", "group_size": 128, "dynamic": True},
}
_EXPERT_GROUPS = {
    "nvfp4": {
        "targets": [EXPERT_TARGET],
        "format": "nvfp4-pack-quantized",
        "weights": {**_FP4, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"},
        "input_activations": {**_FP4, "dynamic": "local", "observer": "static_minmax"},
    },
    "int4": {
        "targets": [EXPERT_TARGET],
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": INT_GROUP,
            "dynamic": False,
        },
        "input_activations": None,
    },
    "fp8": {
        "targets": [EXPERT_TARGET],
        "format": "naive-quantized",
        "weights": {**_FP8, "strategy": "block", "block_structure": [32, 16], "dynamic": False},
        "input_activations": None,
    },
}  # fmt: skip


def quantization_config(experts: str, mtp_layers: int) -> dict[str, Any]:
    layers = CONFIG["num_hidden_layers"]
    draft = [rf"re:^model\.layers\.{layers + i}\..*" for i in range(mtp_layers)]
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "version": "0.17.0",
        "config_groups": {"attention": _ATTENTION_GROUP, "experts": _EXPERT_GROUPS[experts]},
        "ignore": ["lm_head", r"re:^mtp\..*", r"re:^model\.mtp\..*", *draft],
    }


# ------------------------------------------------------------------------------------------------ source


def _random(spec: TensorSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    if spec.dtype == "I64":
        return torch.randint(0, dims.experts, spec.shape, generator=generator)
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[spec.dtype]
    return (torch.randn(spec.shape, generator=generator) * 0.05).to(dtype)


def on_grid(tensors: Tensors, dims: Dims) -> Tensors:
    """Experts that are exactly NVFP4 with power-of-two scales, some in a larger block scale than they need."""
    generator = torch.Generator().manual_seed(3)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    made = dict(tensors)
    for spec in source_tensors(dims):
        if spec.expert is not None and not spec.is_mtp:
            values = grid[torch.randint(0, 8, spec.shape, generator=generator)]
            signs = torch.randint(0, 2, spec.shape, generator=generator) * 2 - 1
            made[spec.name] = (values * signs * 2.0**-6).to(torch.bfloat16)
    return made


def random_source(config: Mapping[str, Any] = CONFIG) -> Tensors:
    dims = Dims.from_config(config)
    generator = torch.Generator().manual_seed(1)
    return {spec.name: _random(spec, dims, generator) for spec in source_tensors(dims)}


def write_source(root: Path, tensors: Tensors, config: Mapping[str, Any] = CONFIG) -> Path:
    _write(root, config, tensors, shards=2)
    (root / "tokenizer.json").write_text("{}", encoding="utf-8")
    return root


# ------------------------------------------------------------------------------------------------ artifact


def write_artifact(
    root: Path, source: Tensors, *, experts: str = "nvfp4", copies: bool = True, mtp: bool = True, pow2: bool = False
) -> Path:
    """Quantize `source` (tensors of CONFIG) and write it in contract form, in three shards."""
    dims = Dims.from_config(CONFIG)
    config = {
        **CONFIG,
        "num_nextn_predict_layers": int(mtp),
        "quantization_config": quantization_config(experts, int(mtp)),
    }
    tensors: Tensors = {}
    for spec in source_tensors(dims):
        if spec.is_mtp and not mtp:
            continue
        if not spec.is_quantizable:
            tensors[spec.name] = source[spec.name]
            continue
        for suffix, tensor in _quantized(spec, source, experts, pow2).items():
            tensors[f"{spec.module}.{suffix}"] = tensor
    if copies and mtp:
        tensors["mtp.0.emb.tok_emb.weight"] = source["embed.weight"].clone()
        tensors["mtp.0.head.weight"] = source["head.weight"].clone()
    _write(root, config, tensors, shards=3)
    (root / "recipe.yaml").write_text("quant_stage: {}\n", encoding="utf-8")
    (root / "tokenizer.json").write_text("{}", encoding="utf-8")
    return root


def _quantized(spec: TensorSpec, source: Tensors, experts: str, pow2: bool) -> Tensors:
    weight = source[spec.name]
    if spec.expert is None:
        return fp8(weight, pow2)
    if experts == "int4":
        return int4(weight)
    if experts == "fp8":
        return fp8_blocks(weight)
    partner = {"w1": "w3", "w3": "w1"}.get(spec.module[-2:], "w2")
    return nvfp4(weight, source[f"{spec.module[:-2]}{partner}.weight"], pow2)


def nvfp4(weight: Tensor, partner: Tensor, pow2: bool = False) -> Tensors:
    """Stock min-max; `partner` shares the global scale."""
    largest = torch.stack((weight.abs().max(), partner.abs().max())).amax().reshape(1)
    global_scale = torch.tensor([2.0**8]) if pow2 else generate_gparam(-largest, largest)
    groups = weight.unflatten(-1, (-1, 16))
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1).float() / 6))) * global_scale
    else:
        args = QuantizationArgs(**dict(NVFP4["weights"]))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale)
    return {**_encode_nvfp4(weight, scale, global_scale), "input_global_scale": torch.tensor([123.5])}


def _encode_nvfp4(weight: Tensor, scale: Tensor, global_scale: Tensor) -> Tensors:
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    return NVFP4PackedCompressor.compress(state, QuantizationScheme(targets=["Linear"], **NVFP4))


def reencoded_nvfp4(weight: Tensor, stored: Tensors, module: str, scale: Tensor) -> Tensors:
    """The tensors of `module` with other block scales (E4M3 values), its weight encoded with them."""
    made = _encode_nvfp4(weight, scale.float(), stored[f"{module}.weight_global_scale"])
    return {f"{module}.{suffix}": tensor for suffix, tensor in made.items()}


def keeping_negative_zeros(root: Path, source: Tensors) -> None:
    """Give each NVFP4 expert of an artifact the -0 that compressed-tensors' encoder made +0."""
    stored, changes = read(root), {}
    for name, packed in stored.items():
        if name.endswith(".weight_packed"):
            weight = source[name.replace("_packed", "")]
            sign = ((weight == 0) & weight.signbit()).to(torch.uint8) << 3
            changes[name] = packed | sign[:, 0::2] | sign[:, 1::2] << 4
    edit(root, changes)


def fp8(weight: Tensor, pow2: bool = False, factor: float = 1.0) -> Tensors:
    rows, columns = (-(-n // 128) for n in weight.shape)
    filled = torch.nn.functional.pad(weight, (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0]))
    largest = filled.reshape(rows, 128, columns, 128).abs().amax((1, 3))
    scale, _ = calculate_qparams(-largest, largest, QuantizationArgs(**dict(FP8_BLOCK["weights"])))
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(largest.float() / 448))).to(scale.dtype)
    scheme = QuantizationScheme(targets=["Linear"], **FP8_BLOCK)
    return FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale * factor}, scheme)


def fp8_blocks(weight: Tensor, factor: float = 1.0) -> Tensors:
    """FP8 weights alone, in blocks of 32x16."""
    group = _EXPERT_GROUPS["fp8"]
    largest = weight.unflatten(1, (-1, 16)).unflatten(0, (-1, 32)).abs().amax((1, 3))
    scale, _ = calculate_qparams(-largest, largest, QuantizationArgs(**group["weights"]))
    state = {"weight": weight, "weight_scale": scale * factor}
    return NaiveQuantizationCompressor.compress(state, QuantizationScheme(**group))


def int4(weight: Tensor, factor: float = 1.0) -> Tensors:
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=INT_GROUP)
    groups = weight.unflatten(-1, (-1, INT_GROUP))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale * factor}, scheme)


# ------------------------------------------------------------------------------------------------ files


def _write(root: Path, config: Mapping[str, Any], tensors: Tensors, shards: int) -> None:
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    size = -(-len(modules) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        together = set(modules[number * size : (number + 1) * size])  # a linear is never cut
        part = [name for name in tensors if name.rpartition(".")[0] in together]
        _save(root / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    _write_index(root, weight_map)


def _save(path: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)


def _write_index(root: Path, weight_map: Mapping[str, str]) -> None:
    total = sum(t.nbytes for path in root.glob("*.safetensors") for t in load_file(path).values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    (root / INDEX).write_text(json.dumps(index), encoding="utf-8")


def read(root: Path) -> Tensors:
    return {name: tensor for path in sorted(root.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def edit(root: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace tensors, add new ones (to the first shard), or remove (None); index and total_size follow."""
    weight_map = json.loads((root / INDEX).read_text())["weight_map"]
    shards = {path.name: load_file(path) for path in sorted(root.glob("*.safetensors"))}
    first = next(iter(shards))
    for name, tensor in changes.items():
        file = weight_map.pop(name, first)
        shards[file].pop(name, None)
        if tensor is not None:
            shards[file][name] = tensor
            weight_map[name] = file
    for file, tensors in shards.items():
        _save(root / file, tensors)
    _write_index(root, weight_map)


def move(root: Path, prefix: str, to: str) -> None:
    """Put every tensor whose name begins so into another shard."""
    index = json.loads((root / INDEX).read_text())["weight_map"]
    shards = {path.name: load_file(path) for path in sorted(root.glob("*.safetensors"))}
    for name in [name for name in index if name.startswith(prefix)]:
        shards[to][name] = shards[index[name]].pop(name)
        index[name] = to
    for file, tensors in shards.items():
        _save(root / file, tensors)
    _write_index(root, index)


def edit_json(root: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((root / file).read_text(encoding="utf-8"))
    change(value)
    (root / file).write_text(json.dumps(value), encoding="utf-8")


def edit_config(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change quantization_config."""
    edit_json(root, "config.json", lambda config: change(config["quantization_config"]))


def copy(root: Path, to: Path) -> Path:
    shutil.copytree(root, to)
    return to
