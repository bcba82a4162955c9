"""Every tensor's name, role, dtype and shape, from the dimensions of a config.json.

Two vocabularies name the same tensors: upstream (`layers.0.attn.wq_a.weight`, what DeepSeek publishes and
vLLM loads) and transformers (`model.layers.0.self_attn.q_a_proj.weight`). Both are written down once, side by
side, in the tables below; every other module looks names up here.

Shape letters: D hidden_size, Q q_lora_rank, N attention heads, H head_dim, G o_groups, R o_lora_rank,
E routed experts, F moe_intermediate_size, K experts per token, V vocabulary, C hc_mult, I index heads,
J index_head_dim, r compress ratio. Of a DSpark draft: T target layers, M width of the Markov head.

Sources: transformers 5.17 `models/deepseek_v4/modeling_deepseek_v4.py` (modules and shapes), the headers of
`deepseek-ai/DeepSeek-V4-Flash` and, for DSpark, `deepseek-ai/DeepSeek-V4-Flash-0731` (names and dtypes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from dsv4q.layout.dims import CSA, DSPARK, HCA, MTP, SLIDING, Dims

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of the safetensors dtype names."""

Shape = tuple[int, ...]

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
    DRAFT_HEAD = "draft head"


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

    @cached_property
    def module(self) -> str:
        """Upstream name of the module that owns it: the name without its last part."""
        return self.name.rpartition(".")[0]

    @cached_property
    def is_mtp(self) -> bool:
        """Whether it is the draft's: every kind of draft lies under `mtp.`."""
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


_EMBED: tuple[_Row, ...] = (
    ("embed.weight", "model.embed_tokens.weight", "BF16", Role.EMBEDDING, lambda d: (d.vocab, d.hidden)),
)
_HEAD: tuple[_Row, ...] = (
    *_head_rows("model."),
    ("head.weight", "lm_head.weight", "BF16", Role.HEAD, lambda d: (d.vocab, d.hidden)),
)


HEAD_COPIES = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}
"""Suffix under `mtp.N.` -> the main tensor of which a copy may lie there (contract, "MTP copies")."""


@dataclass(frozen=True)
class DraftTable:
    """A kind of draft: its stages are sliding-window blocks with score routing, and these rows come before and after.

    Sources: DeepSeek's `inference/model.py` of the releases (`MTPBlock`, the DSpark drafter), their headers.
    """

    label: str
    """What people call it."""
    marks: frozenset[str]
    """First parts of names under `mtp.N.` that tell it from the others."""
    before: tuple[_Row, ...]
    after: tuple[_Row, ...]
    only_at_the_ends: bool
    """`before` belongs to the first stage and `after` to the last one; otherwise both to each."""
    head_copies: bool
    """Whether older loaders want `HEAD_COPIES`; with the other kinds those names break the consumer's loader."""


DRAFTS: dict[str, DraftTable] = {
    MTP: DraftTable(
        label="MTP",
        marks=frozenset({"enorm", "hnorm"}),
        before=(
            ("enorm.weight", "enorm.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden,)),
            ("hnorm.weight", "hnorm.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden,)),
            ("e_proj.weight", "e_proj.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden, d.hidden)),
            ("h_proj.weight", "h_proj.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden, d.hidden)),
        ),
        after=_head_rows(""),
        only_at_the_ends=False,
        head_copies=True,
    ),
    DSPARK: DraftTable(
        label="DSpark",
        marks=frozenset({"main_proj", "main_norm", "markov_head", "confidence_head"}),
        before=(
            ("main_proj.weight", "main_proj.weight", "BF16", Role.DRAFT_INPUT,
             lambda d: (d.hidden, d.draft.targets * d.hidden)),
            ("main_norm.weight", "main_norm.weight", "BF16", Role.DRAFT_INPUT, lambda d: (d.hidden,)),
        ),
        after=(
            *_head_rows(""),
            *((f"markov_head.{w}.weight", f"markov_head.{w}.weight", "BF16", Role.DRAFT_HEAD,
               lambda d: (d.vocab, d.draft.markov_rank)) for w in ("markov_w1", "markov_w2")),
            ("confidence_head.proj.weight", "confidence_head.proj.weight", "BF16", Role.DRAFT_HEAD,
             lambda d: (1, d.hidden + d.draft.markov_rank)),
        ),
        only_at_the_ends=True,
        head_copies=False,
    ),
}  # fmt: skip
"""The kinds of draft, by `Draft.kind`. Neither has compressor, indexer, hash table, embedding or head of its own."""


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


def draft_tensors(dims: Dims, stage: int) -> Iterator[TensorSpec]:
    """Tensors of stage `stage` of the draft."""
    block, table = f"mtp.{stage}", DRAFTS[dims.draft.kind]
    if stage == 0 or not table.only_at_the_ends:
        yield from _specs(dims, table.before, block, f"{block}.", f"{block}.")
    yield from _decoder_block(dims, block, block, SLIDING, hashed=False)
    if stage == dims.draft.stages - 1 or not table.only_at_the_ends:
        yield from _specs(dims, table.after, block, f"{block}.", f"{block}.")


def head_copies(dims: Dims) -> dict[str, str]:
    """Names of the copies of the shared head that an artifact may have -> the main tensor that each copies."""
    table = DRAFTS.get(dims.draft.kind)
    stages = range(dims.draft.stages if table is not None and table.head_copies else 0)
    return {f"mtp.{stage}.{suffix}": main for stage in stages for suffix, main in HEAD_COPIES.items()}


def source_tensors(dims: Dims) -> list[TensorSpec]:
    """Every tensor of a BF16 checkpoint, in the order in which artifacts store them."""
    return list(_source_tensors(dims))


@lru_cache(maxsize=4)
def _source_tensors(dims: Dims) -> tuple[TensorSpec, ...]:
    """The same, made once: several parts of a command ask for the 34,000 of a whole model."""
    specs = list(_specs(dims, _EMBED, "embed", "", ""))
    for layer in range(dims.layers):
        specs += layer_tensors(dims, layer)
    specs += _specs(dims, _HEAD, "head", "", "")
    for stage in range(dims.draft.stages):
        specs += draft_tensors(dims, stage)
    return tuple(specs)
