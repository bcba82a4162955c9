"""The toy checkpoint is what the layout says, and the same bytes every time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from dsv4q.checkpoint.folder import load_model_config
from dsv4q.data.spec import DataSpec
from dsv4q.data.tokens import load_calibration, load_tokenizer
from dsv4q.errors import ConfigError, OutputError
from dsv4q.layout import TensorSpec, source_tensors
from dsv4q.made_up import toy as toy_module
from dsv4q.made_up.toy import (
    RANDOM,
    ToyConfig,
    ToySummary,
    load_toy_config,
    random_values,
    write_toy,
)
from dsv4q.made_up.words import SPECIAL_TOKENS, chat_samples

TINY = ToyConfig(
    hidden_size=128, n_routed_experts=2, compress_ratios=(4, 128), num_hash_layers=1, vocab_size=300, shards=3
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToySummary:
    return write_toy(tmp_path_factory.mktemp("toy") / "checkpoint")


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_toy_has_exactly_the_tensors_of_the_layout(toy: ToySummary) -> None:
    found = {}
    for shard in toy.shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = file.get_slice(name)
                assert name not in found
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    assert found == {spec.name: (spec.dtype, spec.shape) for spec in source_tensors(ToyConfig().dims)}
    assert toy.tensors == len(found)


def test_index_names_the_shard_of_every_tensor(toy: ToySummary) -> None:
    index = json.loads((toy.out / "model.safetensors.index.json").read_text())
    for shard in toy.shards:
        with safe_open(shard, "pt") as file:
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard.name}
    assert index["metadata"]["total_size"] == toy.nbytes == sum(t.nbytes for t in tensors(toy.out).values())


def test_toy_covers_every_kind_of_layer(toy: ToySummary) -> None:
    names = tensors(toy.out)
    ratios = load_model_config(toy.out)["compress_ratios"]
    assert {0, 4, 128} <= set(ratios[:-1]) and ratios[-1] == 0
    assert any(name.endswith("gate.tid2eid") for name in names)
    assert any(name.startswith("layers.") and name.endswith("gate.bias") for name in names)
    assert toy.mtp_tensors == sum(name.startswith("mtp.0.") for name in names) > 0


def test_config_has_the_keys_of_the_release_and_no_quantization() -> None:
    config = ToyConfig().as_config_json()
    assert config["compress_ratios"] == [0, 0, 4, 128, 4, 0]
    assert config["num_hidden_layers"] == 5
    assert config["rope_scaling"]["type"] == "yarn"
    assert config["torch_dtype"] == "bfloat16"
    assert not {"quantization_config", "expert_dtype", "shards"} & set(config)


def test_same_seed_gives_the_same_bytes(toy: ToySummary, tmp_path: Path) -> None:
    write_toy(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(toy.out)


def test_another_process_with_another_hash_seed_gives_the_same_bytes(toy: ToySummary, tmp_path: Path) -> None:
    code = "import sys, pathlib; from dsv4q.made_up.toy import write_toy; write_toy(pathlib.Path(sys.argv[1]))"
    source = Path(toy_module.__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(source), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], env=environment, check=True)
    assert digests(tmp_path / "other") == digests(toy.out)


def test_another_seed_changes_every_tensor_and_nothing_else(tmp_path: Path) -> None:
    a, b = write_toy(tmp_path / "a", TINY, seed=0), write_toy(tmp_path / "b", TINY, seed=1)
    changed = {name for name, digest in digests(a.out).items() if digests(b.out)[name] != digest}
    assert changed == {shard.name for shard in a.shards}
    first, second = tensors(a.out), tensors(b.out)
    assert [name for name in first if torch.equal(first[name], second[name])] == []


def test_no_two_tensors_of_a_toy_are_equal(tmp_path: Path) -> None:
    out = write_toy(tmp_path / "a", TINY).out
    contents = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors(out).values()]
    assert len(set(contents)) == len(contents)


def test_values_do_not_depend_on_sharding(tmp_path: Path) -> None:
    one = tensors(write_toy(tmp_path / "a", dataclasses.replace(TINY, shards=1)).out)
    seven = tensors(write_toy(tmp_path / "b", dataclasses.replace(TINY, shards=7)).out)
    assert one.keys() == seven.keys() and all(torch.equal(one[name], seven[name]) for name in one)


def test_random_values_are_the_published_stream() -> None:
    spec = TensorSpec("layers.0.attn.attn_sink", "", "F32", (4,), "attention sink", "layers.0")
    assert random_values(spec, TINY.dims, 0).view(torch.int32).tolist() == [
        1041973833,
        -1096754647,
        -1098810905,
        1052370002,
    ]


def test_hash_routing_table_has_distinct_experts_in_each_row(toy: ToySummary) -> None:
    table = tensors(toy.out)["layers.0.ffn.gate.tid2eid"]
    assert table.dtype == torch.int64 and int(table.min()) == 0 and int(table.max()) == 7
    assert bool((table[:, 0] != table[:, 1]).all())


def test_weights_are_finite_and_not_constant(toy: ToySummary) -> None:
    for name, t in tensors(toy.out).items():
        values = t.double()
        assert bool(values.isfinite().all()), name
        assert values.numel() == 1 or values.unique().numel() > 1, name


def test_given_values_replace_the_random_ones(tmp_path: Path) -> None:
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    ones = dataclasses.replace(RANDOM, values=lambda s, d, seed: (torch.ones(s.shape, dtype=dtypes[s.dtype]),))
    out = write_toy(tmp_path / "a", TINY, form=ones).out
    assert all(bool((t == 1).all()) for t in tensors(out).values())


def test_given_texts_replace_the_toys_own(tmp_path: Path) -> None:
    given = {"tokenizer.json": "{}", "notes.txt": "another file"}
    summary = write_toy(tmp_path / "a", TINY, form=dataclasses.replace(RANDOM, texts=given))
    assert {name: (summary.out / name).read_text() for name in given} == given
    assert summary.out / "notes.txt" in summary.files


@settings(max_examples=40, deadline=None)
@given(shards=st.integers(1, len(source_tensors(TINY.dims))))
def test_shards_are_contiguous_exact_in_number_and_never_empty(shards: int) -> None:
    specs = source_tensors(TINY.dims)
    parts = toy_module._shards(specs, shards)
    assert [spec for part in parts for spec in part] == specs
    assert len(parts) == shards and all(parts)


def test_shards_are_balanced(toy: ToySummary) -> None:
    sizes = [shard.stat().st_size for shard in toy.shards]
    assert len(sizes) == 4 and max(sizes) < 1.1 * min(sizes)


def test_files_have_ordinary_permissions(toy: ToySummary) -> None:
    assert {file.stat().st_mode & 0o777 for file in toy.out.rglob("*") if file.is_file()} == {0o644}


def test_toy_brings_license_encoding_folder_and_generation_config(toy: ToySummary) -> None:
    assert (toy.out / "LICENSE").read_text().startswith("MIT License")
    assert (toy.out / "encoding" / "README.md").is_file()
    assert json.loads((toy.out / "generation_config.json").read_text())["eos_token_id"] == 1


def test_summary_names_exactly_the_files_that_are_there(toy: ToySummary) -> None:
    assert {*toy.shards, *toy.files} == {file for file in toy.out.rglob("*") if file.is_file()}


def test_tokenizer_round_trips_text_with_special_tokens(toy: ToySummary) -> None:
    tokenizer = load_tokenizer(toy.out)
    text = "".join(SPECIAL_TOKENS) + "Grüße, 東京 – 45 €\n\t\0" + SPECIAL_TOKENS[1]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[:7] == [0, 1, 2, 3, 4, 5, 6] and ids[-1] == 1
    assert tokenizer.get_vocab_size() == 512 == ToyConfig().vocab_size


def test_transformers_loads_the_tokenizer_with_the_same_ids(toy: ToySummary) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(toy.out)
    text = f"{SPECIAL_TOKENS[0]}{SPECIAL_TOKENS[3]}How would you repair the stone bridge?"
    expected = load_tokenizer(toy.out).encode(text, add_special_tokens=False).ids
    assert loaded(text, add_special_tokens=False).input_ids == expected
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


def test_transformers_reads_the_config_as_deepseek_v4(toy: ToySummary) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(toy.out)
    assert config.mlp_layer_types == ["hash_moe"] * 3 + ["moe"] * 2
    assert config.layer_types[2:4] == ["compressed_sparse_attention", "heavily_compressed_attention"]
    assert config.qk_rope_head_dim == 16


def test_chat_samples_suffice_for_the_shipped_calibration(toy: ToySummary) -> None:
    spec = DataSpec(dataset="chat_samples.jsonl", samples=64, max_length=512, micro_batch=8, seed=0)
    data = load_calibration(spec, load_tokenizer(toy.out), toy.out, vocab_size=512)
    assert data.tokens == 32768 and data.conversations_used <= len(chat_samples())


@pytest.mark.parametrize("kind", ["file", "full folder"])
def test_output_that_is_not_an_empty_folder_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    kept = out if kind == "file" else out / "mine.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        write_toy(out, TINY)
    assert kept.read_text() == "mine" and len(list(tmp_path.rglob("*"))) <= 2


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_toy(tmp_path / "file" / "out", TINY)


def test_more_shards_than_tensors_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more shards than tensors"):
        write_toy(tmp_path / "out", dataclasses.replace(TINY, shards=99999))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0), ("hidden_size", "256"), ("shards", True), ("vocab_size", 262), ("num_hash_layers", 6),
        ("num_experts_per_tok", 9), ("o_groups", 3), ("qk_rope_head_dim", 15), ("qk_rope_head_dim", 48),
        ("compress_ratios", ()), ("compress_ratios", (0, 8)), ("shards", 100000),
    ],
)  # fmt: skip
def test_impossible_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        ToyConfig(**{key: value})
    assert error.value.where == key


def test_yaml_config_gives_the_same_toy_config(tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text("hidden_size: 128\ncompress_ratios: [0, 4]\nnum_hash_layers: 1\n")
    assert load_toy_config(file) == ToyConfig(hidden_size=128, compress_ratios=(0, 4), num_hash_layers=1)


def test_empty_yaml_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("# nothing\n")
    assert load_toy_config(tmp_path / "toy.yaml") == ToyConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 128", "unknown key"), ("- 1", "not a mapping"), ("a: [", "not valid YAML"),
        ("hidden_size: many", "cannot have this value"), ("compress_ratios: 4", "not a list"), ("1: 2", "unknown key"),
    ],
)  # fmt: skip
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "toy.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_toy_config(tmp_path / "toy.yaml")


def test_absent_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_toy_config(tmp_path / "none.yaml")


def test_importing_toy_imports_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy")
    code = f"import sys, dsv4q.made_up.toy; print([m for m in {heavy} if m in sys.modules])"
    source = Path(toy_module.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]"
