"""The numbers of a config.json that decide which tensors a DeepSeek-V4 has, its draft's among them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4q.errors import SourceError

MODEL_TYPE = "deepseek_v4"

MAX_SIZE, MAX_COUNT = 1 << 24, 1 << 12
"""Largest width, and most layers or experts, of a config.json: far above any model, and all tables stay small."""

SLIDING, CSA, HCA = 0, 4, 128
"""Compress ratios: sliding window only, compressed sparse (with indexer), heavily compressed attention."""

NO_DRAFT, MTP, DSPARK = "none", "mtp", "dspark"
"""Kinds of draft: what proposes tokens ahead, under `mtp.` whichever it is."""

DSPARK_KEYS = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
"""Without all of them the consumer builds no DSpark draft, or another one."""
CONSUMER_STAGES = 3
"""Stages of a DSpark draft that vLLM builds, whatever the files hold, unless config.json has `n_mtp_layers`."""

_FOREIGN: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("DeepSeek-V4.1", ("v41", "v4_1", "v4.1"), ("engram_", "kv_source_layer_ids"),
     "it is another architecture: n-gram tables (Engram), compressors that layers share, FP8 in blocks of 32x32"),
    ("DeepSeek-V4-Flash-Vision-Exp", ("vision", "v4vl", "v4_vl", "conditionalgeneration"), ("vision", "aligner"),
     "its vision encoder and aligner have no place in the layout, and images go through the whole model"),
)  # fmt: skip
"""Releases that are refused by name: parts of model_type and architectures, beginnings of keys, the reason."""


@dataclass(frozen=True)
class Draft:
    """The draft that a config.json describes."""

    kind: str
    """`NO_DRAFT`, `MTP` or `DSPARK`."""
    stages: int
    """Blocks `mtp.0`, `mtp.1`, …; of MTP one for each layer of it."""
    targets: int = 0
    """Main layers that DSpark looks at."""
    markov_rank: int = 0
    """Width of DSpark's Markov head."""
    block_size: int = 0
    """Tokens that DSpark proposes at a time."""


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
    draft: Draft

    @property
    def mix(self) -> int:
        """Rows of a hyper-connection's `fn`: pre, post and comb logits, (2 + C) * C."""
        return (2 + self.hc_mult) * self.hc_mult

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str | Path = "config.json") -> Dims:
        """Read the dimensions of a parsed config.json.

        Raises:
            SourceError: wrong model_type, a release of another architecture, a key missing or not a positive integer of
                plausible size, ratios unknown or too few, heads that o_groups does not divide, more experts per token
                than there are, a draft whose keys are missing or contradict each other.
        """
        _refuse_foreign(config, where)
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
        numbers = _Numbers(config, where)
        layers = numbers.get("num_hidden_layers", most=MAX_COUNT)
        ratios = _ratios(config, layers, where)
        vocab = numbers.get("vocab_size")
        dims = cls(
            hidden=numbers.get("hidden_size"),
            vocab=vocab,
            layers=layers,
            heads=numbers.get("num_attention_heads"),
            head_dim=numbers.get("head_dim"),
            q_lora=numbers.get("q_lora_rank"),
            o_groups=numbers.get("o_groups"),
            o_lora=numbers.get("o_lora_rank"),
            experts=numbers.get("n_routed_experts", most=MAX_COUNT),
            shared_experts=numbers.get("n_shared_experts", 1),
            experts_per_token=numbers.get("num_experts_per_tok"),
            moe_intermediate=numbers.get("moe_intermediate_size"),
            hc_mult=numbers.get("hc_mult"),
            index_heads=numbers.get("index_n_heads"),
            index_head_dim=numbers.get("index_head_dim"),
            hash_layers=min(numbers.get("num_hash_layers", 3, least=0), layers),
            ratios=ratios[:layers],
            draft=_draft(numbers, layers, ratios[layers:], vocab),
        )
        if dims.heads * dims.head_dim % dims.o_groups:
            product = dims.heads * dims.head_dim
            expected = f"a divisor of num_attention_heads * head_dim = {product:,}"
            raise numbers.contradiction("o_groups", expected, f"{dims.o_groups:,}")
        if dims.experts_per_token > dims.experts:
            expected = f"at most n_routed_experts = {dims.experts:,}"
            raise numbers.contradiction("num_experts_per_tok", expected, f"{dims.experts_per_token:,}")
        return dims


_BY_TRANSFORMERS = ("layer_types", "compress_rates", "mlp_layer_types", "rope_parameters")
"""Keys that transformers' DeepSeek-V4 config writes in place of the release's."""


@dataclass(frozen=True)
class _Numbers:
    """The integers of a config.json."""

    config: Mapping[str, Any]
    where: str | Path

    def get(self, key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        value = self.config.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.unusable(key, f"an integer from {least} to {most:,}")
        return value

    def unusable(self, key: str, expected: str) -> SourceError:
        """What to say of a key that is missing or has a value of another kind."""
        return SourceError(
            f"config.json has no usable {key}",
            where=f"{self.where}: {key}",
            expected=expected,
            found=_found(self.config, key),
        )

    def contradiction(self, key: str, expected: str, found: str) -> SourceError:
        """What to say of a value that does not fit the others."""
        return SourceError(
            "config.json has numbers that do not fit each other",
            where=f"{self.where}: {key}",
            expected=expected,
            found=found,
        )


def _found(config: Mapping[str, Any], key: str) -> str:
    return reprlib.repr(config[key]) if key in config else "no such key"


def _refuse_foreign(config: Mapping[str, Any], where: str | Path) -> None:
    """Name the relatives of DeepSeek-V4 that are no DeepSeek-V4.

    Sources: model_type `deepseek_v41` and the keys of DeepSeek-V4.1-Flash's config.json
    (https://github.com/huggingface/transformers/issues/48755), the vision encoder of V4-Flash-Vision-Exp
    (https://github.com/huggingface/pytorch-image-models/issues/2772).
    """
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [])]
    text = " ".join(name.lower() for name in names if isinstance(name, str))
    if "deepseek" not in text:
        return
    for release, parts, keys, reason in _FOREIGN:
        mark = next((part for part in parts if part in text), None) or next(
            (key for key in config if key.startswith(keys)), None
        )
        if mark is not None:
            raise SourceError(
                f"{release} cannot be quantized: {reason}",
                where=where,
                expected="DeepSeek-V4-Flash or -Pro, a release for text alone",
                found=f"{reprlib.repr(mark)} in model_type, architectures or the keys",
                hint="README has a table of the releases that can",
            )


def _ratios(config: Mapping[str, Any], layers: int, where: str | Path) -> tuple[int, ...]:
    """Of the main layers, and behind them of the draft's stages."""
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
    return tuple(ratios)


def _draft(numbers: _Numbers, layers: int, ratios: tuple[int, ...], vocab: int) -> Draft:
    """The draft by its own keys, for num_nextn_predict_layers is 1 with MTP and with DSpark.

    Args:
        ratios: those behind the main layers'.
    """
    if not any(key.startswith("dspark_") for key in numbers.config):
        count = numbers.get("num_nextn_predict_layers", 0, least=0, most=MAX_COUNT)
        if 0 < count < len(ratios) and set(ratios) == {SLIDING}:
            expected = f"{layers + count} entries: {layers} main layers, {count} of num_nextn_predict_layers"
            found = f"{layers + len(ratios)} entries, as with a DSpark draft, but no dspark_* key"
            raise numbers.contradiction("compress_ratios", expected, found)
        return Draft(MTP if count else NO_DRAFT, count)
    for key in DSPARK_KEYS:
        if key not in numbers.config:
            raise numbers.unusable(key, f"all of {', '.join(DSPARK_KEYS)}: the config describes a DSpark draft")
    stages, targets = len(ratios), numbers.config["dspark_target_layer_ids"]
    if not isinstance(targets, list) or any(type(t) is not int or not 0 <= t < layers for t in targets):
        raise numbers.unusable("dspark_target_layer_ids", f"a list of main layers, 0 to {layers - 1}")
    told = f"compress_ratios has {layers + stages} entries, {layers} of them main layers"
    if not stages or any(ratio != SLIDING for ratio in ratios):
        expected = f"{layers} entries for the main layers and a 0 for each stage of the DSpark draft"
        raise numbers.contradiction("compress_ratios", expected, f"{list(ratios)} behind the main layers")
    if len(targets) != stages:
        expected = f"{stages} main layers, one for each stage ({told})"
        raise numbers.contradiction("dspark_target_layer_ids", expected, f"{len(targets)}: {targets}")
    built = numbers.get("n_mtp_layers", CONSUMER_STAGES, most=MAX_COUNT)
    if built != stages:
        expected = f"{built} stages: so many the consumer builds, by n_mtp_layers or else {CONSUMER_STAGES}"
        raise numbers.contradiction("compress_ratios", expected, f"{stages} stages ({told})")
    numbers.get("dspark_noise_token_id", least=0, most=vocab - 1)
    return Draft(
        DSPARK, stages, stages, numbers.get("dspark_markov_rank"), numbers.get("dspark_block_size", most=MAX_COUNT)
    )
