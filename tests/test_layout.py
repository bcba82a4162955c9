"""the layout: the tensors of the published model, and a named refusal for every config.json that describes none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4q.checkpoint.folder import load_model_config
from dsv4q.errors import SourceError
from dsv4q.layout import MAX_COUNT, Dims, Role, TensorSpec, draft_tensors, layer_tensors, source_tensors
from runs import FLASH

CONFIG = load_model_config(FLASH)
DIMS = Dims.from_config(CONFIG)

SIZES = (
    "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
    "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "hc_mult", "index_n_heads",
    "index_head_dim",
)  # fmt: skip
OPTIONAL = ("n_shared_experts", "num_hash_layers", "num_nextn_predict_layers")


@pytest.fixture(scope="module")
def specs() -> list[TensorSpec]:
    return source_tensors(DIMS)


def refusal(config: Mapping[str, Any]) -> SourceError:
    with pytest.raises(SourceError) as error:
        Dims.from_config(config)
    return error.value


# ------------------------------------------------------------------------------------------------ the published model


def test_the_published_model_has_35020_tensors_of_which_797_are_mtp(specs: list[TensorSpec]) -> None:
    assert len(specs) == 35_020
    assert sum(spec.is_mtp for spec in specs) == 797


def test_the_published_model_has_581975531080_bytes(specs: list[TensorSpec]) -> None:
    assert sum(spec.nbytes for spec in specs) == 581_975_531_080


def test_a_recipe_may_target_33024_expert_and_215_attention_linears(specs: list[TensorSpec]) -> None:
    counts = Counter(spec.role for spec in specs if spec.is_quantizable)
    assert counts == {Role.ROUTED_EXPERT: 33_024, Role.ATTENTION: 215}


@pytest.mark.parametrize("vocabulary", ["name", "hf_name"])
def test_no_name_is_given_twice(specs: list[TensorSpec], vocabulary: str) -> None:
    assert max(Counter(getattr(spec, vocabulary) for spec in specs).values()) == 1


def test_names_of_the_two_vocabularies_agree_only_below_mtp(specs: list[TensorSpec]) -> None:
    main = {spec.name for spec in specs if not spec.is_mtp}
    assert main.isdisjoint(spec.hf_name for spec in specs)


def test_blocks_follow_each_other_in_the_order_of_the_forward_pass(specs: list[TensorSpec]) -> None:
    blocks = [spec.block for spec in specs]
    starts = [block for before, block in zip(["", *blocks], blocks, strict=False) if block != before]
    assert starts == ["embed", *(f"layers.{i}" for i in range(43)), "head", "mtp.0"]


# The names are those of the published headers; sizes are the published config's.
ATTENTION = """
    attn_norm.weight          input_layernorm.weight                   BF16 4096
    attn.wq_a.weight          self_attn.q_a_proj.weight                BF16 1024 4096
    attn.q_norm.weight        self_attn.q_a_norm.weight                BF16 1024
    attn.wq_b.weight          self_attn.q_b_proj.weight                BF16 32768 1024
    attn.wkv.weight           self_attn.kv_proj.weight                 BF16 512 4096
    attn.kv_norm.weight       self_attn.kv_norm.weight                 BF16 512
    attn.wo_a.weight          self_attn.o_a_proj.weight                BF16 8192 4096
    attn.wo_b.weight          self_attn.o_b_proj.weight                BF16 4096 8192
    attn.attn_sink            self_attn.sinks                          F32 64
"""
REST = """
    hc_attn_fn                attn_hc.fn                               F32 24 16384
    hc_attn_base              attn_hc.base                             F32 24
    hc_attn_scale             attn_hc.scale                            F32 3
    hc_ffn_fn                 ffn_hc.fn                                F32 24 16384
    hc_ffn_base               ffn_hc.base                              F32 24
    hc_ffn_scale              ffn_hc.scale                             F32 3
    ffn_norm.weight           post_attention_layernorm.weight          BF16 4096
    ffn.gate.weight           mlp.gate.weight                          BF16 256 4096
    ffn.shared_experts.w1.weight mlp.shared_experts.gate_proj.weight   BF16 2048 4096
    ffn.shared_experts.w2.weight mlp.shared_experts.down_proj.weight   BF16 4096 2048
    ffn.shared_experts.w3.weight mlp.shared_experts.up_proj.weight     BF16 2048 4096
    ffn.experts.0.w1.weight   mlp.experts.0.gate_proj.weight           BF16 2048 4096
    ffn.experts.0.w2.weight   mlp.experts.0.down_proj.weight           BF16 4096 2048
    ffn.experts.0.w3.weight   mlp.experts.0.up_proj.weight             BF16 2048 4096
"""
HASHED = "    ffn.gate.tid2eid          mlp.gate.tid2eid                 I64 129280 6\n"
SCORED = "    ffn.gate.bias             mlp.gate.e_score_correction_bias F32 256\n"
HEAVY = """
    attn.compressor.wkv.weight   self_attn.compressor.kv_proj.weight   BF16 512 4096
    attn.compressor.wgate.weight self_attn.compressor.gate_proj.weight BF16 512 4096
    attn.compressor.norm.weight  self_attn.compressor.kv_norm.weight   BF16 512
    attn.compressor.ape          self_attn.compressor.position_bias    F32 128 512
"""
SPARSE = """
    attn.compressor.wkv.weight   self_attn.compressor.kv_proj.weight   BF16 1024 4096
    attn.compressor.wgate.weight self_attn.compressor.gate_proj.weight BF16 1024 4096
    attn.compressor.norm.weight  self_attn.compressor.kv_norm.weight   BF16 512
    attn.compressor.ape          self_attn.compressor.position_bias    F32 4 1024
    attn.indexer.wq_b.weight     self_attn.compressor.indexer.q_b_proj.weight             BF16 8192 1024
    attn.indexer.weights_proj.weight self_attn.compressor.indexer.scorer.weights_proj.weight BF16 64 4096
    attn.indexer.compressor.wkv.weight   self_attn.compressor.indexer.kv_proj.weight      BF16 256 4096
    attn.indexer.compressor.wgate.weight self_attn.compressor.indexer.gate_proj.weight    BF16 256 4096
    attn.indexer.compressor.norm.weight  self_attn.compressor.indexer.kv_norm.weight      BF16 128
    attn.indexer.compressor.ape          self_attn.compressor.indexer.position_bias       F32 4 256
"""
DRAFT = """
    enorm.weight              enorm.weight                             BF16 4096
    hnorm.weight              hnorm.weight                             BF16 4096
    e_proj.weight             e_proj.weight                            BF16 4096 4096
    h_proj.weight             h_proj.weight                            BF16 4096 4096
    norm.weight               norm.weight                              BF16 4096
    hc_head_fn                hc_head.hc_fn                            F32 4 16384
    hc_head_base              hc_head.hc_base                          F32 4
    hc_head_scale             hc_head.hc_scale                         F32 1
"""
MAIN = """
    embed.weight              model.embed_tokens.weight                BF16 129280 4096
    norm.weight               model.norm.weight                        BF16 4096
    hc_head_fn                model.hc_head.hc_fn                      F32 4 16384
    hc_head_base              model.hc_head.hc_base                    F32 4
    hc_head_scale             model.hc_head.hc_scale                   F32 1
    head.weight               lm_head.weight                           BF16 129280 4096
"""

Row = tuple[str, str, str, tuple[int, ...]]


def golden(text: str, prefix: str = "", hf: str = "") -> set[Row]:
    lines = (line.split() for line in text.splitlines() if line.strip())
    return {(prefix + name, hf + hf_name, dtype, tuple(map(int, shape))) for name, hf_name, dtype, *shape in lines}


def rows(tensors: list[TensorSpec]) -> set[Row]:
    """All but the experts 1 to 255."""
    return {(spec.name, spec.hf_name, spec.dtype, spec.shape) for spec in tensors if not spec.expert}


@pytest.mark.parametrize(
    ("layer", "kind"),
    [(0, HASHED), (2, SPARSE + HASHED), (3, HEAVY + SCORED), (4, SPARSE + SCORED)],
    ids=["sliding-hashed", "sparse-hashed", "heavy-scored", "sparse-scored"],
)
def test_a_main_layer_has_exactly_these_tensors(layer: int, kind: str) -> None:
    tensors = list(layer_tensors(DIMS, layer))
    assert rows(tensors) == golden(ATTENTION + REST + kind, f"layers.{layer}.", f"model.layers.{layer}.")
    assert sum(spec.role == Role.ROUTED_EXPERT for spec in tensors) == 256 * 3


def test_an_mtp_layer_has_exactly_these_tensors() -> None:
    tensors = list(draft_tensors(DIMS, 0))
    assert rows(tensors) == golden(ATTENTION + REST + SCORED + DRAFT, "mtp.0.", "mtp.0.")
    assert sum(spec.role == Role.ROUTED_EXPERT for spec in tensors) == 256 * 3


def test_outside_the_layers_there_are_exactly_these_tensors(specs: list[TensorSpec]) -> None:
    assert rows([spec for spec in specs if spec.block in ("embed", "head")]) == golden(MAIN)


# ------------------------------------------------------------------------------------------------ Dims.from_config


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [None, 0, -1, True, 4096.0, "4096", pytest.param(10**4000, id="huge")])
def test_a_size_that_is_no_plausible_integer_is_refused_by_key(key: str, value: object) -> None:
    assert refusal(CONFIG | {key: value}).where == f"config.json: {key}"


@pytest.mark.parametrize("key", SIZES)
def test_an_absent_size_is_refused_by_key(key: str) -> None:
    error = refusal({name: value for name, value in CONFIG.items() if name != key})
    assert (error.where, error.found) == (f"config.json: {key}", "no such key")


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"])
def test_counts_that_would_fill_the_memory_with_names_are_refused(key: str) -> None:
    assert refusal(CONFIG | {key: MAX_COUNT + 1}).where == f"config.json: {key}"


def test_optional_sizes_have_the_defaults_of_the_architecture() -> None:
    dims = Dims.from_config({key: value for key, value in CONFIG.items() if key not in OPTIONAL})
    assert (dims.shared_experts, dims.hash_layers, dims.draft.stages) == (1, 3, 0)


@pytest.mark.parametrize("ratios", [None, 4, [0] * 42, [4.0] * 43, [False] * 43, [8] * 43, [[]] * 43])
def test_ratios_of_another_form_are_refused(ratios: object) -> None:
    assert refusal(CONFIG | {"compress_ratios": ratios}).where == "config.json: compress_ratios"


@pytest.mark.parametrize(("key", "value"), [("o_groups", 7), ("o_groups", 65536), ("num_experts_per_tok", 257)])
def test_sizes_that_contradict_each_other_are_refused(key: str, value: int) -> None:
    error = refusal(CONFIG | {key: value})
    assert (error.where, error.found) == (f"config.json: {key}", f"{value:,}")


@pytest.mark.parametrize("found", ["deepseek_v3", None, ["deepseek_v4"], "\ud800"])
def test_another_model_type_is_refused_and_shown(found: object) -> None:
    error = refusal({"model_type": found})
    assert error.where == "config.json: model_type"
    assert repr(found) in error.text().encode().decode()


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("model_type", "compress_ratios", *SIZES, *OPTIONAL)
any_config = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), any_json, max_size=4)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(changed=any_config, removed=st.sets(st.sampled_from(KEYS), max_size=2), alone=st.booleans())
def test_any_json_object_gives_dims_or_a_refusal_that_prints(
    changed: dict[str, Any], removed: set[str], alone: bool
) -> None:
    config = changed if alone else {k: v for k, v in CONFIG.items() if k not in removed} | changed
    try:
        assert min(Dims.from_config(config).ratios, default=-1) >= 0
    except SourceError as error:
        error.text().encode()


@fuzz
@given(sizes=st.fixed_dictionaries({key: st.integers(1, 4) for key in SIZES}), mtp=st.integers(0, 2))
def test_no_accepted_config_has_an_empty_tensor_or_a_name_twice(sizes: dict[str, int], mtp: int) -> None:
    try:
        dims = Dims.from_config(CONFIG | sizes | {"num_nextn_predict_layers": mtp})
    except SourceError as error:
        assert "do not fit each other" in error.what
        return
    specs = source_tensors(dims)
    assert all(min(spec.shape) > 0 for spec in specs)
    assert len({spec.name for spec in specs}) == len({spec.hf_name for spec in specs}) == len(specs)


# ------------------------------------------------------------------------------------------------ load_model_config


def load(tmp_path: Path, raw: bytes) -> dict[str, Any]:
    (tmp_path / "config.json").write_bytes(raw)
    return load_model_config(tmp_path)


def test_a_config_is_found_by_its_folder_and_by_its_own_name(tmp_path: Path) -> None:
    assert load(tmp_path, b'{"a": "\xc3\xa4"}') == load_model_config(tmp_path / "config.json") == {"a": "ä"}


@pytest.mark.parametrize("name", ["absent", "a" * 5000, "nul\0"], ids=["absent", "too-long", "nul"])
def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        load_model_config(tmp_path / name)


def test_a_disk_that_fails_is_a_refusal() -> None:
    # Its first page is never mapped: a regular file that opens and cannot be read.
    with pytest.raises(SourceError, match="cannot be read"):
        load_model_config(Path("/proc/self/mem"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut-off", "not-utf-8", "nested", "huge-integer"],
)
def test_what_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(SourceError, match="not valid JSON"):
        load(tmp_path, raw)


def test_what_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a JSON object"):
        load(tmp_path, b"[]")


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "compress_ratios"])
def test_nesting_of_any_depth_is_a_refusal(tmp_path: Path, key: str) -> None:
    for depth in range(1, 1100):
        raw = json.dumps(CONFIG | {key: 0}).replace(f'"{key}": 0', f'"{key}": {"[" * depth}{"]" * depth}')
        with pytest.raises(SourceError):
            Dims.from_config(load(tmp_path, raw.encode()))


@fuzz
@given(raw=st.binary(max_size=32) | any_json.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_config_give_an_object_or_a_refusal_that_prints(tmp_path: Path, raw: bytes) -> None:
    try:
        assert isinstance(load(tmp_path, raw), dict)
    except SourceError as error:
        error.text().encode()
