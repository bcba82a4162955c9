"""Stock llmcompressor on a checkpoint of ours: its own sequential pipeline, its own save, read back for comparison.

Also a tiny checkpoint of its own making, so that these tests do not depend on `dsv4q.made_up.toy`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from dsv4q.layout import Dims, TensorSpec, source_tensors
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP, upstream_names

ATTENTION_TARGET = r"re:.*\.(attn|self_attn)\.(wq_a|wq_b|wkv|wo_a|wo_b|q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"
EXPERT_TARGET = r"re:.*\.(ffn|mlp)\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"
RECIPE: dict[str, Any] = {
    "default_stage": {
        "default_modifiers": {
            "QuantizationModifier": {
                "ignore": ["lm_head", r"re:^mtp\..*"],
                "config_groups": {
                    "attention": {
                        "targets": [ATTENTION_TARGET],
                        "format": "float-quantized",
                        "weights": {
                            "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128],
                            "symmetric": True, "dynamic": False,
                        },
                        "input_activations": {
                            "num_bits": 8, "type": "float", "strategy": "group", "group_size": 128,
                            "symmetric": True, "dynamic": True, "observer": None,
                        },
                    },
                    "experts": {
                        "targets": [EXPERT_TARGET],
                        "format": "nvfp4-pack-quantized",
                        "weights": {
                            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                            "symmetric": True, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn",
                        },
                        "input_activations": {
                            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                            "symmetric": True, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn",
                            "observer": "static_minmax",
                        },
                    },
                },
            }
        }
    }
}  # fmt: skip
"""FP8 block attention, NVFP4 routed experts, MTP and all the rest as they are; stock observers."""

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json with every kind of layer: sliding, ratio 4 and 128, hash and score routing, one MTP layer."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16",
        "vocab_size": 512, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "qk_rope_head_dim": 16,
        "q_lora_rank": 128, "o_groups": 2, "o_lora_rank": 64, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "index_n_heads": 2,
        "index_head_dim": 32, "index_topk": 8, "num_hash_layers": 2, "num_nextn_predict_layers": 1,
        "compress_ratios": [0, 4, 128, 4, 128, 0], "sliding_window": 32, "rope_theta": 10000,
        "compress_rope_theta": 160000, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                         "original_max_position_embeddings": 256},
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
        **changes,
    }  # fmt: skip


def _values(spec: TensorSpec, experts: int, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype == "I64":
        return torch.stack(
            [torch.randperm(experts, generator=generator)[: spec.shape[1]] for _ in range(spec.shape[0])]
        )
    noise = torch.randn(spec.shape, generator=generator)
    if "norm" in spec.name.rpartition(".weight")[0]:
        noise = 1 + 0.1 * noise
    elif len(spec.shape) == 2:
        noise /= math.sqrt(spec.shape[1])
    return noise.to(_DTYPES[spec.dtype])


def write_tiny(folder: Path, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a tiny upstream-named checkpoint of two shards; the tensors by upstream name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    specs = source_tensors(Dims.from_config(config))
    tensors = {spec.name: _values(spec, config["n_routed_experts"], generator) for spec in specs}
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    size = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file of a folder; a name that occurs twice is an error."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert name not in found, f"{name} is in two files"
                found[name] = file.get_tensor(name)
    return found


def assert_same_tensors(stock: dict[str, torch.Tensor], artifact_folder: Path) -> None:
    """The folder holds exactly these names, dtypes, shapes and bytes (so -0 differs from 0)."""
    found = read_tensors(artifact_folder)
    assert sorted(stock) == sorted(found)
    for name, tensor in stock.items():
        other = found[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(as_bytes(tensor), as_bytes(other)), name


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as U8 [bytes]."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def load(folder: Path) -> DeepseekV4ForCausalLMWithMTP:
    """The whole model in memory, every tensor in its source dtype."""
    with upstream_names():
        return DeepseekV4ForCausalLMWithMTP.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()


def run_stock(
    source: Path,
    out: Path,
    batches: Sequence[torch.Tensor],
    recipe: str = yaml.safe_dump(RECIPE),
    all_experts: bool = True,
) -> dict[str, torch.Tensor]:
    """Quantize with stock `oneshot(pipeline="sequential")` and stock save into `out`.

    Args:
        batches: token ids, I64 [B, S] each; one calibration batch each.
        recipe: YAML text, as `oneshot(recipe=...)` takes it.
        all_experts: whether every expert sees every token.

    Returns:
        Every tensor of the files it wrote, under upstream names (`...w1.weight_packed`).
    """
    model = load(source)
    oneshot(
        model=model,
        processor=object(),
        dataset=DataLoader([{"input_ids": ids} for ids in batches], batch_size=None),
        recipe=recipe,
        pipeline="sequential",
        sequential_targets=["DeepseekV4DecoderLayer"],
        moe_calibrate_all_experts=all_experts,
    )
    model.save_pretrained(out, save_compressed=True)
    return read_tensors(out)
