"""Small real DeepSeek-V4 checkpoints: the input of the demo, the tests and CI.

A toy has everything that the release has, only narrower: sliding-window, ratio-4 and ratio-128 layers, hash and
score routing, a draft, several shards with an index, config.json, a tokenizer, chat samples. Names, dtypes
and shapes come from `layout/tensors.py`; the values are random (see `random_values`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.files import INDEX
from dsv4q.errors import ConfigError, OutputError
from dsv4q.layout import CONSUMER_STAGES, CSA, DSPARK, HCA, MTP, NO_DRAFT, SLIDING, Dims, TensorSpec, source_tensors
from dsv4q.made_up.generated import moments
from dsv4q.made_up.words import (
    ENCODING_README,
    LICENSE,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    chat_samples,
    pretty_json,
    train_tokenizer,
)

if TYPE_CHECKING:
    import torch

LEAST_VOCAB = 256 + len(SPECIAL_TOKENS)
MAX_SHARDS = 99999


@dataclass(frozen=True)
class ToyConfig:
    """Dimensions of a toy, under the names of config.json, and the number of shards.

    The defaults keep each input dimension of a quantizable linear a multiple of 128 (INT4 groups and FP8 block
    columns need it), while `wkv` has 64 rows, so that a ragged FP8 block occurs.

    Raises:
        ConfigError: a value that no DeepSeek-V4 model can have.
    """

    hidden_size: int = 256
    moe_intermediate_size: int = 128
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    compress_ratios: tuple[int, ...] = (SLIDING, SLIDING, CSA, HCA, CSA)
    """One entry per main layer; those of the draft (sliding window) are added in config.json."""
    num_hash_layers: int = 3
    num_nextn_predict_layers: int = 1
    """MTP layers; with `dspark_markov_rank` it says nothing, as in the releases."""
    dspark_markov_rank: int = 0
    """Of a DSpark draft, which looks at the last three main layers; 0: the draft is MTP."""
    num_attention_heads: int = 4
    head_dim: int = 64
    qk_rope_head_dim: int = 16
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 64
    index_n_heads: int = 2
    index_head_dim: int = 32
    index_topk: int = 16
    hc_mult: int = 4
    sliding_window: int = 32
    vocab_size: int = 512
    shards: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = {"vocab_size": LEAST_VOCAB, **dict.fromkeys(_MAY_BE_ZERO, 0)}.get(field.name, 1)
            if field.name != "compress_ratios" and (type(value) is not int or value < least):
                raise ConfigError(
                    "The toy cannot have this value",
                    where=field.name,
                    expected=f"an integer of at least {least}",
                    found=repr(value),
                )
        for where, holds, expected in self._rules():
            if not holds:
                raise ConfigError("The toy cannot have this value", where=where, expected=expected, found=self)

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        ratios = self.compress_ratios
        known = bool(ratios) and all(type(r) is int and r in (SLIDING, CSA, HCA) for r in ratios)
        yield "compress_ratios", known, "one entry out of 0, 4 and 128 for each main layer"
        yield "num_hash_layers", self.num_hash_layers <= len(ratios), f"at most {len(ratios)}, the main layers"
        yield "num_experts_per_tok", self.num_experts_per_tok <= self.n_routed_experts, "at most n_routed_experts"
        yield "o_groups", self.num_attention_heads % self.o_groups == 0, "a divisor of num_attention_heads"
        yield "qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "an even number"
        narrow = min(self.head_dim, self.index_head_dim)
        yield "qk_rope_head_dim", self.qk_rope_head_dim <= narrow, "at most head_dim and index_head_dim"
        yield "shards", self.shards <= MAX_SHARDS, f"at most {MAX_SHARDS}"

    def as_config_json(self, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config.json of the toy: every key of the release's but the two that say how it is quantized; `more`."""
        dims, layers = dataclasses.asdict(self), len(self.compress_ratios)
        del dims["shards"]
        stages = self.num_nextn_predict_layers
        if self.dspark_markov_rank:
            stages = CONSUMER_STAGES
            targets = [max(0, layers - stages + stage) for stage in range(stages)]
            dims |= {"dspark_block_size": 5, "dspark_noise_token_id": 2, "dspark_target_layer_ids": targets}
        else:
            del dims["dspark_markov_rank"]
        dims["compress_ratios"] = [*self.compress_ratios, *[SLIDING] * stages]
        return dict(sorted({**_FIXED, **dims, "num_hidden_layers": layers, **(more or {})}.items()))

    @property
    def dims(self) -> Dims:
        return Dims.from_config(self.as_config_json())


FOR_VLLM: dict[str, Any] = {
    "moe_intermediate_size": 256,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 128,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 64,
    "sliding_window": 128,
}
"""Dimensions for which vLLM 0.33.0 has kernels (`widths` in engines/compat.yaml); the default ones it cannot build."""

_MAY_BE_ZERO = ("num_hash_layers", "num_nextn_predict_layers", "dspark_markov_rank")
_MARKOV_RANK = 32


def with_draft(toy: ToyConfig, kind: str) -> ToyConfig:
    """The same toy with a draft of this kind: `none`, `mtp` or `dspark`."""
    layers = {NO_DRAFT: 0, MTP: max(1, toy.num_nextn_predict_layers)}.get(kind, toy.num_nextn_predict_layers)
    rank = (toy.dspark_markov_rank or _MARKOV_RANK) if kind == DSPARK else 0
    return dataclasses.replace(toy, num_nextn_predict_layers=layers, dspark_markov_rank=rank)


_FIXED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "hc_eps": 1e-06,
    "hc_sinkhorn_iters": 20,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
}
"""Keys of the release's config.json that are no dimension, with the release's values."""


@dataclass(frozen=True)
class ToyForm:
    """What lies in a toy's files; the model is the same in every form."""

    config: Mapping[str, Any]
    """More keys of config.json."""
    stored: Callable[[TensorSpec], tuple[TensorSpec, ...]]
    """Tensor of the model -> the tensors in the files: names, dtypes, shapes."""
    values: Callable[[TensorSpec, Dims, int], tuple[torch.Tensor, ...]]
    """(tensor of the model, dimensions, seed) -> values of each of them, in the same order."""
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> text of files in place of the toy's own, such as another tokenizer.json."""


@dataclass(frozen=True)
class ToySummary:
    """What `write_toy` wrote."""

    out: Path
    tensors: int
    mtp_tensors: int
    nbytes: int
    """Bytes of tensor data, as in `metadata.total_size` of the index."""
    shards: tuple[Path, ...]
    files: tuple[Path, ...]
    """Every other file."""
    conversations: int


def load_toy_config(path: Path | None, draft: str | None = None, *, for_vllm: bool = False) -> ToyConfig:
    """Read a YAML mapping of ToyConfig's fields; those left out keep their defaults.

    Args:
        path: None: nothing but defaults.
        for_vllm: `FOR_VLLM` in their place.
        draft: see `with_draft`; None: as the fields say.

    Raises:
        ConfigError: absent, not UTF-8 YAML, not a mapping, an unknown key, an impossible value.
    """
    toy = ToyConfig() if path is None else _read(path)
    if for_vllm:
        toy = dataclasses.replace(toy, **FOR_VLLM)
    return toy if draft is None else with_draft(toy, draft)


def _read(path: Path) -> ToyConfig:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("The toy config cannot be read", where=path, found=error.strerror) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("The toy config is not valid YAML", where=path, found=error) from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError("The toy config is not a mapping", where=path, found=type(values).__name__)
    known = [field.name for field in dataclasses.fields(ToyConfig)]
    for key in values:
        if key not in known:
            raise ConfigError("The toy config has an unknown key", where=f"{path}: {key}", expected=", ".join(known))
    ratios = values.get("compress_ratios")
    if isinstance(ratios, list):
        values["compress_ratios"] = tuple(ratios)
    elif ratios is not None:
        raise ConfigError("This is not a list", where=f"{path}: compress_ratios", found=repr(ratios))
    return ToyConfig(**values)


def random_values(spec: TensorSpec, dims: Dims, seed: int) -> torch.Tensor:
    """Random values of one tensor: a function of (seed, name, shape) alone, so that order does not matter.

    Scales are those of a trained model as far as a forward pass feels them: linears keep the variance of their
    input, norms are near 1, hyper-connections mix all streams, `tid2eid` has distinct experts in each row.
    The stream is NumPy's Philox, keyed with a digest: it is the same on every machine and thread count.
    """
    import numpy as np
    import torch

    key = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()[:16]
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    if spec.name.endswith("tid2eid"):
        order = rng.random((dims.vocab, dims.experts), dtype=np.float32).argsort(axis=1, kind="stable")
        return torch.from_numpy(order[:, : dims.experts_per_token].astype(np.int64, copy=True))
    mean, std = moments(spec)
    values = torch.from_numpy(rng.standard_normal(spec.shape, dtype=np.float32))
    return values.mul_(std).add_(mean).to(torch.bfloat16 if spec.dtype == "BF16" else torch.float32)


RANDOM = ToyForm(
    config={}, stored=lambda spec: (spec,), values=lambda spec, dims, seed: (random_values(spec, dims, seed),)
)
"""A BF16 checkpoint of random weights, which lie on no grid. `native.py` has other forms."""


def write_toy(out: Path, toy: ToyConfig | None = None, seed: int = 0, form: ToyForm = RANDOM) -> ToySummary:
    """Write a complete toy checkpoint into `out`; memory holds one shard.

    The index comes last, so a folder with an index is whole. The same arguments give the same bytes. Only
    weights depend on `seed`; tokenizer and chat samples are the same for all toys of one vocabulary size.

    Raises:
        OutputError: `out` is a file, is not empty, or cannot be written.
        ConfigError: more shards than tensors.
    """
    toy = ToyConfig() if toy is None else toy
    dims = toy.dims
    parts = {part: (spec, i) for spec in source_tensors(dims) for i, part in enumerate(form.stored(spec))}
    origins = {part.name: origin for part, origin in parts.items()}
    shards = _shards(list(parts), toy.shards)

    def make(name: str) -> torch.Tensor:
        spec, index = origins[name]
        return form.values(spec, dims, seed)[index].contiguous()

    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(
                "The output folder is not empty",
                where=out,
                expected="a new or empty folder",
                hint="give another folder, or remove this one first",
            )
        out.mkdir(parents=True, exist_ok=True)
        conversations = chat_samples()
        texts = _small_files(toy, form, conversations)
        for name, text in texts.items():
            _write_text(out / name, text)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for name, members in zip(names, shards, strict=True):
            _write_shard(out / name, members, make)
        nbytes = sum(part.nbytes for part in parts)
        weight_map = {part.name: name for name, members in zip(names, shards, strict=True) for part in members}
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(out / INDEX, pretty_json(index))
    except OSError as error:
        raise OutputError("The toy cannot be written", where=error.filename or out, found=error.strerror) from error
    return ToySummary(
        out=out,
        tensors=len(parts),
        mtp_tensors=sum(part.is_mtp for part in parts),
        nbytes=nbytes,
        shards=tuple(out / name for name in names),
        files=tuple(out / name for name in (*texts, INDEX)),
        conversations=len(conversations),
    )


def _shards(specs: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    """Cut `specs` into exactly `count` contiguous shards of about equal bytes, none of them empty."""
    if count > len(specs):
        raise ConfigError("The toy has more shards than tensors", where="shards", expected=len(specs), found=count)
    total = sum(spec.nbytes for spec in specs)
    shards: list[list[TensorSpec]] = [[]]
    before = 0
    for i, spec in enumerate(specs):
        wanted = int((before + spec.nbytes / 2) * count / total)
        forced = count - (len(specs) - i)
        if shards[-1] and max(wanted, forced) >= len(shards):
            shards.append([])
        shards[-1].append(spec)
        before += spec.nbytes
    return shards


def _write_shard(path: Path, specs: Sequence[TensorSpec], make: Callable[[str], torch.Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = {spec.name: make(spec.name) for spec in specs}
    for spec in specs:
        assert tuple(tensors[spec.name].shape) == spec.shape, spec.name
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves the 0600 of its temporary file


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    path.chmod(0o644)


def _small_files(toy: ToyConfig, form: ToyForm, conversations: Sequence[list[dict[str, str]]]) -> dict[str, str]:
    """Name -> text of all files but the shards and the index."""
    generation = {"_from_model_config": True, "bos_token_id": 0, "do_sample": True, "eos_token_id": 1}
    return {
        "config.json": pretty_json(toy.as_config_json(form.config)),
        "generation_config.json": pretty_json({**generation, "temperature": 1.0, "top_p": 1.0}),
        "tokenizer.json": train_tokenizer(conversations, toy.vocab_size),
        "tokenizer_config.json": pretty_json(TOKENIZER_CONFIG),
        "encoding/README.md": ENCODING_README,
        "LICENSE": LICENSE,
        "chat_samples.jsonl": "".join(
            json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations
        ),
        **form.texts,
    }
