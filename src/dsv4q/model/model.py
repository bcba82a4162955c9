"""The transformers model of DeepSeek-V4 with real MTP modules and 2-D experts, whole or one block at a time.

Shape letters: B batch, S sequence, C hc_mult (residual streams), D hidden_size, V vocabulary.

Whole: `from_pretrained` and `save_pretrained` under `upstream_names()` read and write upstream-named checkpoints,
every tensor in its source dtype, byte for byte. In blocks: `build_meta_model` allocates nothing, `set_tensor` puts
in what a block needs, `embed`, `block_inputs` and `run_block` compute what the whole model's forward computes, bit
for bit, and `release` lets the block go.

Source of the MTP forward: DeepSeek's `inference/model.py` of the release (`MTPBlock`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
)

from dsv4q.errors import SourceError
from dsv4q.layout import CSA, HCA, MODEL_TYPE, MTP, SLIDING, Dims, Draft, Role, TensorSpec, source_tensors
from dsv4q.model import upstream


class BlockInputs(TypedDict):
    """What every decoder block gets besides the streams and the token ids."""

    position_ids: torch.Tensor
    """I64 [1, S]."""
    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """`main` and `compress` rotary (cos, sin), each [1, S, qk_rope_head_dim / 2]."""
    attention_mask: torch.Tensor | None
    """Additive sliding-window causal mask [B, 1, S, S]."""


class DeepseekV4MTPLayer(DeepseekV4DecoderLayer):
    """One multi-token-prediction layer: its input projections, a sliding-window block, its own hc_head and norm."""

    def __init__(self, config: DeepseekV4Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.e_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.h_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hc_head = DeepseekV4HyperHead(config)

    def forward(
        self,
        streams: torch.Tensor,
        next_embeddings: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Streams [B, S, C, D] of the model and embeddings [B, S, D] of the next tokens -> this layer's streams."""
        mixed = self.e_proj(self.enorm(next_embeddings)).unsqueeze(2) + self.h_proj(self.hnorm(streams))
        out: torch.Tensor = super().forward(
            mixed,
            input_ids=input_ids,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
        )
        return out


class DeepseekV4DSparkStage(DeepseekV4DecoderLayer):
    """One stage of a DSpark draft: a place for each of its tensors. Its forward is the block's alone."""

    def __init__(self, config: DeepseekV4Config, layer_idx: int, *, first: bool, last: bool) -> None:
        super().__init__(config, layer_idx)
        width, rank = config.hidden_size, config.dspark_markov_rank
        if first:
            self.main_proj = nn.Linear(len(config.dspark_target_layer_ids) * width, width, bias=False)
            self.main_norm = DeepseekV4RMSNorm(width, eps=config.rms_norm_eps)
        if last:
            self.norm = DeepseekV4RMSNorm(width, eps=config.rms_norm_eps)
            self.hc_head = DeepseekV4HyperHead(config)
            heads = {name: nn.Linear(rank, config.vocab_size, bias=False) for name in ("markov_w1", "markov_w2")}
            self.markov_head = nn.ModuleDict(heads)
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(width + rank, 1, bias=False)})


class DeepseekV4ForCausalLMWithMTP(DeepseekV4ForCausalLM):
    """`DeepseekV4ForCausalLM` plus `mtp.N` of either kind, with every expert a separate linear.

    Parameter and buffer names are `TensorSpec.hf_name` of `layout/tensors.py`. The forward of the main model is
    untouched. Build it with `build_meta_model`, or load it under `upstream_names()`: its own constructor allocates
    fused experts on the current device before it replaces them.

    Attributes:
        expert_modules: routed experts that a block has as modules. One stands for all where they are worked on as
            stacks: 33,000 modules take llmcompressor most of a minute.
    """

    def __init__(self, config: DeepseekV4Config, expert_modules: int | None = None) -> None:
        super().__init__(config)
        self.mtp = nn.ModuleList(_draft(config))
        self.expert_modules = expert_modules or config.n_routed_experts
        experts, few = upstream.linear_experts(), copy.deepcopy(config)
        few.n_routed_experts = self.expert_modules
        for layer in (*self.model.layers, *self.mtp):
            layer.mlp.experts = experts(few)
        self.post_init()
        upstream.load_every_tensor_in_its_dtype(self)

    def residual_streams(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids I64 [B, S] -> residual streams [B, S, C, D] after the last main block, before hc_head."""
        streams, inputs = embed(self, input_ids), block_inputs(self, input_ids)
        for layer in range(len(self.model.layers)):
            streams = run_block(self, layer, streams, input_ids, inputs)
        return streams

    def draft_streams(self, streams: torch.Tensor, next_ids: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Streams of MTP layer `index`.

        Args:
            streams: [B, S, C, D], of the main model (index 0) or of MTP layer `index - 1`, at positions 0 … S-1.
            next_ids: I64 [B, S], the token that follows each of these positions.
        """
        embedded = self.model.embed_tokens(next_ids)
        inputs = block_inputs(self, next_ids)
        out: torch.Tensor = self.mtp[index](streams, embedded, next_ids, **inputs)
        return out

    def draft_logits(self, streams: torch.Tensor, next_ids: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Draft logits [B, S, V]: at position t for the token after `next_ids[:, t]`. Arguments: `draft_streams`."""
        layer: Any = self.mtp[index]
        out: torch.Tensor = self.lm_head(layer.norm(layer.hc_head(self.draft_streams(streams, next_ids, index))))
        return out


def _draft(config: DeepseekV4Config) -> Iterator[DeepseekV4DecoderLayer]:
    """The blocks `mtp.N`: DSpark's stages if the config has its keys, else so many MTP layers as it says."""
    targets = getattr(config, "dspark_target_layer_ids", None)
    count = len(targets) if targets else config.num_nextn_predict_layers or 0
    extended, layers = _with_layers(config, count), config.num_hidden_layers
    for stage in range(count):
        if targets:
            yield DeepseekV4DSparkStage(extended, layers + stage, first=stage == 0, last=stage == count - 1)
        else:
            yield DeepseekV4MTPLayer(extended, layers + stage)


def _with_layers(config: DeepseekV4Config, count: int) -> DeepseekV4Config:
    """A copy of the config that has `count` more sliding-window, score-routed layers."""
    extended = copy.deepcopy(config)
    extended.num_hidden_layers = config.num_hidden_layers + count
    extended.layer_types = [*config.layer_types, *["sliding_attention"] * count]
    extended.mlp_layer_types = [*config.mlp_layer_types, *["moe"] * count]
    return extended


# ---------------------------------------------------------------------------------------------------------------
# names


def name_pairs() -> list[tuple[str, str]]:
    r"""Anchored regex pairs (upstream, transformers), made from the tables of `layout/tensors.py`.

    transformers allows one group per pattern, lets every matching pattern fire, and runs the list backwards while
    saving. So the leaf of an expert is renamed before its middle, and the prefix of a main layer last. Modules are
    matched up to their last dot, so `weight_scale` and the like of a compressed module are renamed too.
    """
    body: dict[tuple[str, str], None] = {}
    top: dict[tuple[str, str], None] = {}
    block, expert = r"(layers\.\d+|mtp\.\d+)", r"(layers\.\d+\.ffn\.experts\.\d+|mtp\.\d+\.ffn\.experts\.\d+)"
    for spec in source_tensors(_ALL_KINDS):
        name, hf_name = spec.name, spec.hf_name
        end = "$"
        if spec.role in (Role.ATTENTION, Role.ROUTED_EXPERT):
            end, name, hf_name = r"\.", name.removesuffix(".weight"), hf_name.removesuffix(".weight")
        if spec.expert is not None:
            leaf, hf_leaf = name.rpartition(".")[2], hf_name.rpartition(".")[2]
            body[rf"^{expert}\.{leaf}{end}", rf"^\1\.{hf_leaf}{end}"] = None
        elif spec.block in ("embed", "head"):
            top[f"^{re.escape(name)}{end}", f"^{re.escape(hf_name)}{end}"] = None
        else:
            suffix = name.removeprefix(f"{spec.block}.")
            hf_suffix = hf_name.removeprefix("model.").removeprefix(f"{spec.block}.")
            if suffix != hf_suffix:
                body[rf"^{block}\.{re.escape(suffix)}{end}", rf"^\1\.{re.escape(hf_suffix)}{end}"] = None
    return [
        *body,
        (rf"^{block}\.ffn\.experts\.", r"^\1\.mlp\.experts\."),
        (r"^layers\.(\d+)\.", r"^model\.layers\.\1\."),
        *top,
    ]


_ALL_KINDS = Dims(
    hidden=1, vocab=1, layers=3, heads=1, head_dim=1, q_lora=1, o_groups=1, o_lora=1, experts=1, shared_experts=1,
    experts_per_token=1, moe_intermediate=1, hc_mult=1, index_heads=1, index_head_dim=1, hash_layers=1,
    ratios=(SLIDING, CSA, HCA), draft=Draft(MTP, 1),
)  # fmt: skip
"""The smallest dimensions that have a tensor of every kind."""


@contextmanager
def upstream_names() -> Iterator[None]:
    """Context in which `from_pretrained` reads upstream-named checkpoints, which the model then writes again."""
    with upstream.checkpoint_names(MODEL_TYPE, name_pairs()):
        yield


# ---------------------------------------------------------------------------------------------------------------
# a model without memory, filled block by block


def build_meta_model(
    config: Mapping[str, Any], name_or_path: str, expert_modules: int | None = None
) -> DeepseekV4ForCausalLMWithMTP:
    """The whole model on the meta device, in eval mode, with eager attention.

    Args:
        config: a parsed config.json; its `quantization_config` is left out, for the model computes in BF16.
        name_or_path: what llmcompressor will read config.json from (`oneshot` refuses a model without it).
        expert_modules: routed experts of each block as modules; all if left out.

    Raises:
        SourceError: transformers does not take a value of config.json.
    """
    # A deep copy, for DeepseekV4Config writes into the nested mappings that it is given (rope_scaling).
    settings = copy.deepcopy({key: value for key, value in config.items() if key != "quantization_config"})
    settings.setdefault("num_nextn_predict_layers", 0)
    try:
        hf_config = DeepseekV4Config.from_dict(settings)
        hf_config.dtype = torch.bfloat16
        hf_config._attn_implementation = "eager"
        with torch.device("meta"):
            model = DeepseekV4ForCausalLMWithMTP(hf_config, expert_modules)
    except (KeyError, TypeError, ValueError) as error:  # a value that transformers looks at first here
        raise SourceError(
            "transformers cannot build the model that config.json describes",
            where=Path(name_or_path) / "config.json",
            found=f"{type(error).__name__}: {error}"[:300],
            hint="compare it with config.json of the release",
        ) from error
    # Not by torch's default dtype, which is that of other threads too: the first blocks come in meanwhile.
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in upstream.F32_TENSORS):
            set_tensor(model, name, parameter.to(torch.bfloat16))
    model.requires_grad_(False)
    model.config._name_or_path = name_or_path
    return model.eval()


def linears_of(model: DeepseekV4ForCausalLMWithMTP, specs: Iterable[TensorSpec]) -> Iterator[nn.Linear]:
    """The linears with these weights, or those that stand for them; each is looked up once."""
    known: dict[str, nn.Linear] = {}
    for spec in specs:
        name = spec.hf_name.removesuffix(".weight")
        if spec.expert is not None:
            name = name.replace(f".experts.{spec.expert}.", f".experts.{spec.expert % model.expert_modules}.")
        if name not in known:
            found = model.get_submodule(name)
            assert isinstance(found, nn.Linear), spec.hf_name
            known[name] = found
        yield known[name]


def set_tensor(model: nn.Module, hf_name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` where the model has the parameter or buffer `hf_name`; dtype and device become the tensor's.

    Raises:
        SourceError: the model has no tensor of that name, or one of another shape.
    """
    path, _, leaf = hf_name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise SourceError("The model has no such tensor", where=hf_name) from error
    old = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if old is None:
        raise SourceError("The model has no such tensor", where=hf_name)
    if old.shape != tensor.shape:
        raise SourceError(
            "A tensor has the wrong shape", where=hf_name, expected=list(old.shape), found=list(tensor.shape)
        )
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def release(module: nn.Module, but: nn.Module | None = None) -> None:
    """Give back the memory of a block: every parameter and buffer goes to the meta device, dtype and shape kept.

    Rotary frequencies stay, for no checkpoint holds them (some hundred bytes a block).

    Args:
        but: a part that has nothing to give back; looking through its hundreds of linears would take longer than all
            the rest.
    """
    passed = {but}
    for part in module.modules() if but is None else _modules(module, passed):
        if isinstance(part, DeepseekV4RotaryEmbedding):
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to("meta")


def _modules(module: nn.Module, passed: set[nn.Module | None]) -> Iterator[nn.Module]:
    """A module and all below it, without those in `passed` and below them."""
    if module in passed:
        return
    yield module
    for child in module.children():
        yield from _modules(child, passed)


def rebuild_rotary(model: nn.Module, device: torch.device | str) -> None:
    """Compute all rotary frequencies (main, compressors, indexers, MTP) on the CPU and put them on `device`.

    They are non-persistent buffers, so a model from the meta device has none; the CPU computes them because
    `from_pretrained` does, so streaming and stock agree bit for bit.
    """
    for part in model.modules():
        if isinstance(part, DeepseekV4RotaryEmbedding):
            with torch.device("cpu"):
                fresh = DeepseekV4RotaryEmbedding(part.config)
            for name, buffer in fresh.named_buffers():
                part._buffers[name] = buffer.to(device)


# ---------------------------------------------------------------------------------------------------------------
# the forward, block by block


def embed(model: DeepseekV4ForCausalLMWithMTP, input_ids: torch.Tensor) -> torch.Tensor:
    """Token ids I64 [B, S] -> residual streams [B, S, C, D] before the first block: C copies of the embedding."""
    embedded: torch.Tensor = model.model.embed_tokens(input_ids)
    return embedded.unsqueeze(2).expand(-1, -1, model.config.hc_mult, -1).contiguous()


def block_inputs(model: DeepseekV4ForCausalLMWithMTP, input_ids: torch.Tensor) -> BlockInputs:
    """Positions, rotary and mask for a batch of unpadded sequences [B, S], as the main model's forward makes them.

    Needs `rebuild_rotary` on a meta model; of the embedding only its dtype, so it may be released already.
    """
    batch, length = input_ids.shape
    position_ids = torch.arange(length, device=input_ids.device).unsqueeze(0)
    like = torch.empty((), dtype=model.model.embed_tokens.weight.dtype, device=input_ids.device)
    like = like.expand(batch, length, model.config.hidden_size)
    rotary = model.model.rotary_emb
    return BlockInputs(
        position_ids=position_ids,
        position_embeddings={
            kind: rotary(like, position_ids=position_ids, layer_type=kind) for kind in ("main", "compress")
        },
        attention_mask=create_sliding_window_causal_mask(
            config=model.config,
            inputs_embeds=like,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
        ),
    )


def run_block(
    model: DeepseekV4ForCausalLMWithMTP,
    layer_index: int,
    streams: torch.Tensor,
    input_ids: torch.Tensor,
    inputs: BlockInputs,
) -> torch.Tensor:
    """Streams [B, S, C, D] through main block `layer_index`; hash layers route by `input_ids` [B, S]."""
    out: torch.Tensor = model.model.layers[layer_index](streams, input_ids=input_ids, **inputs)
    return out
