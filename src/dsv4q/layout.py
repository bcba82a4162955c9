"""DeepSeek-V4 as data: every tensor's name, role, dtype and shape, from a config.json.

Two vocabularies name the same tensors: upstream (`layers.0.attn.wq_a.weight`, what DeepSeek publishes and
vLLM loads) and transformers (`model.layers.0.self_attn.q_a_proj.weight`). Both are written down once, side by
side, in the tables below; every other module looks names up here.

Shape letters: D hidden_size, Q q_lora_rank, N attention heads, H head_dim, G o_groups, R o_lora_rank,
E routed experts, F moe_intermediate_size, K experts per token, V vocabulary, C hc_mult, I index heads,
J index_head_dim, r compress ratio.

Sources: transformers 5.17 `models/deepseek_v4/modeling_deepseek_v4.py` (modules and shapes), the headers of
`deepseek-ai/DeepSeek-V4-Flash` (names and dtypes).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4q.errors import SourceError

MODEL_TYPE = "deepseek_v4"

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of the safetensors dtype names."""

Shape = tuple[int, ...]

MAX_SIZE, MAX_COUNT = 1 << 24, 1 << 12
"""Largest width, and most layers or experts, of a config.json: far above any model, and the tables below stay small."""

SLIDING, CSA, HCA = 0, 4, 128
"""Compress ratios: sliding window only, compressed sparse (with indexer), heavily compressed attention."""

ATTENTION_PROJECTIONS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
EXPERT_PROJECTIONS = ("w1", "w2", "w3")
HF_PROJECTION = {
    "wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv": "kv_proj", "wo_a": "o_a_proj", "wo_b": "o_b_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
"""Upstream projection name -> transformers' name of the same linear."""


class Role:
    """What a tensor is for; the classes that plan and report count by."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    HYPER_CONNECTION = "hyper-connection"
    ATTENTION = "attention projection"
    ATTENTION_SINK = "attention sink"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    ROUTER = "router"
    SHARED_EXPERT = "shared expert"
    ROUTED_EXPERT = "routed expert"
    DRAFT_INPUT = "draft input"


@dataclass(frozen=True)
class Dims:
    """The numbers of a DeepSeek-V4 config.json that decide its tensors."""

    hidden: int
    vocab: int
    layers: int
    heads: int
    head_dim: int
    q_lora: int
    o_groups: int
    o_lora: int
    experts: int
    shared_experts: int
    experts_per_token: int
    moe_intermediate: int
    hc_mult: int
    index_heads: int
    index_head_dim: int
    hash_layers: int
    ratios: tuple[int, ...]
    """Compress ratio of each main layer."""
    mtp_layers: int

    @property
    def mix(self) -> int:
        """Rows of a hyper-connection's `fn`: pre, post and comb logits, (2 + C) * C."""
        return (2 + self.hc_mult) * self.hc_mult

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str | Path = "config.json") -> Dims:
        """Read the dimensions of a parsed config.json.

        Raises:
            SourceError: wrong model_type, a key missing or not a positive integer of plausible size, ratios unknown or
                too few, heads that o_groups does not divide, more experts per token than there are.
        """
        if config.get("model_type") != MODEL_TYPE:
            raise SourceError(
                "This is not a DeepSeek-V4 checkpoint",
                where=f"{where}: model_type",
                expected=MODEL_TYPE,
                found=_found(config, "model_type"),
            )

        if "compress_ratios" not in config and any(key in config for key in _BY_TRANSFORMERS):
            raise SourceError(
                "This config.json was saved by transformers, which does not keep what the release's says",
                where=f"{where}: compress_ratios",
                found=f"{', '.join(key for key in _BY_TRANSFORMERS if key in config)} instead of compress_ratios",
                hint="take config.json of the release that these weights came from",
            )

        def number(key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
            value = config.get(key, default)
            if type(value) is not int or not least <= value <= most:
                raise SourceError(
                    f"config.json has no usable {key}",
                    where=f"{where}: {key}",
                    expected=f"an integer from {least} to {most:,}",
                    found=_found(config, key),
                )
            return value

        layers = number("num_hidden_layers", most=MAX_COUNT)
        dims = cls(
            hidden=number("hidden_size"),
            vocab=number("vocab_size"),
            layers=layers,
            heads=number("num_attention_heads"),
            head_dim=number("head_dim"),
            q_lora=number("q_lora_rank"),
            o_groups=number("o_groups"),
            o_lora=number("o_lora_rank"),
            experts=number("n_routed_experts", most=MAX_COUNT),
            shared_experts=number("n_shared_experts", 1),
            experts_per_token=number("num_experts_per_tok"),
            moe_intermediate=number("moe_intermediate_size"),
            hc_mult=number("hc_mult"),
            index_heads=number("index_n_heads"),
            index_head_dim=number("index_head_dim"),
            hash_layers=min(number("num_hash_layers", 3, least=0), layers),
            ratios=_ratios(config, layers, where),
            mtp_layers=number("num_nextn_predict_layers", 0, least=0, most=MAX_COUNT),
        )
        if dims.heads * dims.head_dim % dims.o_groups:
            raise SourceError(
                "config.json has numbers that do not fit each other",
                where=f"{where}: o_groups",
                expected=f"a divisor of num_attention_heads * head_dim = {dims.heads * dims.head_dim:,}",
                found=f"{dims.o_groups:,}",
            )
        if dims.experts_per_token > dims.experts:
            raise SourceError(
                "config.json has numbers that do not fit each other",
                where=f"{where}: num_experts_per_tok",
                expected=f"at most n_routed_experts = {dims.experts:,}",
                found=f"{dims.experts_per_token:,}",
            )
        return dims


_BY_TRANSFORMERS = ("layer_types", "compress_rates", "mlp_layer_types", "rope_parameters")
"""Keys that transformers' DeepSeek-V4 config writes in place of the release's."""


def _found(config: Mapping[str, Any], key: str) -> str:
    return reprlib.repr(config[key]) if key in config else "no such key"


def _ratios(config: Mapping[str, Any], layers: int, where: str | Path) -> tuple[int, ...]:
    ratios = config.get("compress_ratios")
    # 4.0 and False equal ratios, but are none.
    if (
        not isinstance(ratios, list)
        or len(ratios) < layers
        or any(type(ratio) is not int or ratio not in (SLIDING, CSA, HCA) for ratio in ratios)
    ):
        raise SourceError(
            "config.json has no usable compress_ratios",
            where=f"{where}: compress_ratios",
            expected=f"a list of at least {layers} entries out of 0, 4 and 128",
            found=_found(config, "compress_ratios"),
        )
    return tuple(ratios[:layers])


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a BF16 checkpoint of these dimensions must have."""

    name: str
    """Upstream name."""
    hf_name: str
    """Name in the transformers model with MTP (`model/model.py`)."""
    dtype: str
    """safetensors dtype name."""
    shape: Shape
    role: str
    block: str
    """Unit of streaming: `embed`, `layers.L`, `mtp.N` or `head`, in this order on disk."""
    expert: int | None = None
    """Index of the routed expert, if it is one."""

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def module(self) -> str:
        """Upstream name of the module that owns it: the name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def is_mtp(self) -> bool:
        return self.block.startswith("mtp.")

    @property
    def class_name(self) -> str:
        """The class that plan, report and diff count it under: its role, and of the draft's that it is one."""
        return f"mtp: {self.role}" if self.is_mtp else self.role

    @property
    def is_quantizable(self) -> bool:
        """Routed experts and attention projections of main layers: all that a recipe may target."""
        return self.role in (Role.ROUTED_EXPERT, Role.ATTENTION) and not self.is_mtp


_ShapeOf = Callable[[Dims], Shape]
_Row = tuple[str, str, str, str, _ShapeOf]  # upstream suffix, transformers suffix, dtype, role, shape


def _hyper_connection(site: str) -> tuple[_Row, ...]:
    role = Role.HYPER_CONNECTION
    return (
        (f"hc_{site}_fn", f"{site}_hc.fn", "F32", role, lambda d: (d.mix, d.hc_mult * d.hidden)),
        (f"hc_{site}_base", f"{site}_hc.base", "F32", role, lambda d: (d.mix,)),
        (f"hc_{site}_scale", f"{site}_hc.scale", "F32", role, lambda d: (3,)),
    )


_ATTENTION: tuple[_Row, ...] = (
    ("attn_norm.weight", "input_layernorm.weight", "BF16", Role.NORM, lambda d: (d.hidden,)),
    ("attn.wq_a.weight", "self_attn.q_a_proj.weight", "BF16", Role.ATTENTION, lambda d: (d.q_lora, d.hidden)),
    ("attn.q_norm.weight", "self_attn.q_a_norm.weight", "BF16", Role.NORM, lambda d: (d.q_lora,)),
    ("attn.wq_b.weight", "self_attn.q_b_proj.weight", "BF16", Role.ATTENTION,
     lambda d: (d.heads * d.head_dim, d.q_lora)),
    ("attn.wkv.weight", "self_attn.kv_proj.weight", "BF16", Role.ATTENTION, lambda d: (d.head_dim, d.hidden)),
    ("attn.kv_norm.weight", "self_attn.kv_norm.weight", "BF16", Role.NORM, lambda d: (d.head_dim,)),
    ("attn.wo_a.weight", "self_attn.o_a_proj.weight", "BF16", Role.ATTENTION,
     lambda d: (d.o_groups * d.o_lora, d.heads * d.head_dim // d.o_groups)),
    ("attn.wo_b.weight", "self_attn.o_b_proj.weight", "BF16", Role.ATTENTION,
     lambda d: (d.hidden, d.o_groups * d.o_lora)),
    ("attn.attn_sink", "self_attn.sinks", "F32", Role.ATTENTION_SINK, lambda d: (d.heads,)),
)  # fmt: skip


def _compressor(prefix: str, hf: str, role: str, ratio: int, width: Callable[[Dims], int]) -> tuple[_Row, ...]:
    """A compressor pools `ratio` tokens; ratio 4 has two overlapping series, so twice the rows."""
    series = 2 if ratio == CSA else 1
    return (
        (f"{prefix}.wkv.weight", f"{hf}.kv_proj.weight", "BF16", role, lambda d: (series * width(d), d.hidden)),
        (f"{prefix}.wgate.weight", f"{hf}.gate_proj.weight", "BF16", role, lambda d: (series * width(d), d.hidden)),
        (f"{prefix}.norm.weight", f"{hf}.kv_norm.weight", "BF16", role, lambda d: (width(d),)),
        (f"{prefix}.ape", f"{hf}.position_bias", "F32", role, lambda d: (ratio, series * width(d))),
    )


def _compression(ratio: int) -> tuple[_Row, ...]:
    if ratio == SLIDING:
        return ()
    rows = _compressor("attn.compressor", "self_attn.compressor", Role.COMPRESSOR, ratio, lambda d: d.head_dim)
    if ratio == HCA:
        return rows
    hf = "self_attn.compressor.indexer"
    return (
        *rows,
        ("attn.indexer.wq_b.weight", f"{hf}.q_b_proj.weight", "BF16", Role.INDEXER,
         lambda d: (d.index_heads * d.index_head_dim, d.q_lora)),
        ("attn.indexer.weights_proj.weight", f"{hf}.scorer.weights_proj.weight", "BF16", Role.INDEXER,
         lambda d: (d.index_heads, d.hidden)),
        *_compressor("attn.indexer.compressor", hf, Role.INDEXER, ratio, lambda d: d.index_head_dim),
    )  # fmt: skip


_FFN_NORM: tuple[_Row, ...] = (
    ("ffn_norm.weight", "post_attention_layernorm.weight", "BF16", Role.NORM, lambda d: (d.hidden,)),
    ("ffn.gate.weight", "mlp.gate.weight", "BF16", Role.ROUTER, lambda d: (d.experts, d.hidden)),
)
_GATE_BIAS: _Row = (
    "ffn.gate.bias", "mlp.gate.e_score_correction_bias", "F32", Role.ROUTER, lambda d: (d.experts,)
)  # fmt: skip
_GATE_HASH: _Row = (
    "ffn.gate.tid2eid", "mlp.gate.tid2eid", "I64", Role.ROUTER, lambda d: (d.vocab, d.experts_per_token)
)  # fmt: skip


def _mlp(prefix: str, hf: str, role: str, width: Callable[[Dims], int]) -> tuple[_Row, ...]:
    return tuple(
        (f"{prefix}.{p}.weight", f"{hf}.{HF_PROJECTION[p]}.weight", "BF16", role,
         (lambda d: (d.hidden, width(d))) if p == "w2" else (lambda d: (width(d), d.hidden)))
        for p in EXPERT_PROJECTIONS
    )  # fmt: skip


_SHARED = _mlp(
    "ffn.shared_experts", "mlp.shared_experts", Role.SHARED_EXPERT, lambda d: d.shared_experts * d.moe_intermediate
)


def _head_rows(hf: str) -> tuple[_Row, ...]:
    role = Role.HYPER_CONNECTION
    return (
        ("norm.weight", f"{hf}norm.weight", "BF16", Role.NORM, lambda d: (d.hidden,)),
        ("hc_head_fn", f"{hf}hc_head.hc_fn", "F32", role, lambda d: (d.hc_mult, d.hc_mult * d.hidden)),
        ("hc_head_base", f"{hf}hc_head.hc_base", "F32", role, lambda d: (d.hc_mult,)),
        ("hc_head_scale", f"{hf}hc_head.hc_scale", "F32", role, lambda d: (1,)),
    )


_DRAFT_INPUT: tuple[_Row, ...] = (
    ("enorm.weight", "enorm.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden,)),
    ("hnorm.weight", "hnorm.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden,)),
    ("e_proj.weight", "e_proj.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden, d.hidden)),
    ("h_proj.weight", "h_proj.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden, d.hidden)),
)
_EMBED: tuple[_Row, ...] = (
    ("embed.weight", "model.embed_tokens.weight", "BF16", Role.EMBEDDING, lambda d: (d.vocab, d.hidden)),
)
_HEAD: tuple[_Row, ...] = (
    *_head_rows("model."),
    ("head.weight", "lm_head.weight", "BF16", Role.HEAD, lambda d: (d.vocab, d.hidden)),
)

HEAD_COPIES = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}
"""Suffix under `mtp.N.` -> the main tensor of which older loaders want a copy there (contract, "MTP copies")."""


def _specs(dims: Dims, rows: tuple[_Row, ...], block: str, name: str, hf: str) -> Iterator[TensorSpec]:
    for suffix, hf_suffix, dtype, role, shape in rows:
        yield TensorSpec(f"{name}{suffix}", f"{hf}{hf_suffix}", dtype, shape(dims), role, block)


def _decoder_block(dims: Dims, block: str, hf: str, ratio: int, hashed: bool) -> Iterator[TensorSpec]:
    rows = (
        *_ATTENTION,
        *_compression(ratio),
        *_hyper_connection("attn"),
        *_hyper_connection("ffn"),
        *_FFN_NORM,
        _GATE_HASH if hashed else _GATE_BIAS,
        *_SHARED,
    )
    yield from _specs(dims, rows, block, f"{block}.", f"{hf}.")
    wide, narrow = (dims.moe_intermediate, dims.hidden), (dims.hidden, dims.moe_intermediate)
    for e in range(dims.experts):
        for p in EXPERT_PROJECTIONS:
            yield TensorSpec(
                f"{block}.ffn.experts.{e}.{p}.weight",
                f"{hf}.mlp.experts.{e}.{HF_PROJECTION[p]}.weight",
                "BF16",
                narrow if p == "w2" else wide,
                Role.ROUTED_EXPERT,
                block,
                expert=e,
            )


def layer_tensors(dims: Dims, layer: int) -> Iterator[TensorSpec]:
    """Tensors of main decoder block `layer`."""
    yield from _decoder_block(
        dims, f"layers.{layer}", f"model.layers.{layer}", dims.ratios[layer], layer < dims.hash_layers
    )


def mtp_tensors(dims: Dims, index: int) -> Iterator[TensorSpec]:
    """Tensors of MTP layer `index`: a sliding-window block with score routing, its input, its own head's norm."""
    block = f"mtp.{index}"
    yield from _specs(dims, _DRAFT_INPUT, block, f"{block}.", f"{block}.")
    yield from _decoder_block(dims, block, block, SLIDING, hashed=False)
    yield from _specs(dims, _head_rows(""), block, f"{block}.", f"{block}.")


def source_tensors(dims: Dims) -> list[TensorSpec]:
    """Every tensor of a BF16 checkpoint, in the order in which artifacts store them."""
    specs = list(_specs(dims, _EMBED, "embed", "", ""))
    for layer in range(dims.layers):
        specs += layer_tensors(dims, layer)
    specs += _specs(dims, _HEAD, "head", "", "")
    for index in range(dims.mtp_layers):
        specs += mtp_tensors(dims, index)
    return specs
