"""Files as their readers take them, config.json key by key, copies of the shared head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import artifact_maker as maker
from artifact_maker import INDEX, edit, edit_json, read
from dsv4q.__main__ import main
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import write_toy

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def tensors() -> maker.Tensors:
    return maker.random_source()


@pytest.fixture(scope="module")
def source(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.write_source(tmp_path_factory.mktemp("source") / "bf16", tensors)


@pytest.fixture(scope="module")
def made(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.write_artifact(tmp_path_factory.mktemp("made") / "nvfp4", tensors)


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return maker.copy(made, tmp_path / "artifact")


def judged(capsys: pytest.CaptureFixture[str], artifact: Path, *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and differences of the real command."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), *map(str, arguments), "--json"])
    return stopped.value.code or 0, json.loads(capsys.readouterr().out)["differences"]  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the index


@pytest.mark.parametrize("other", ["./{}", "../artifact/{}", "x/../{}", "config.json", "{}/", "/{}", "recipe.yaml"])
@pytest.mark.parametrize("every", [True, False])
def test_another_way_to_a_file_in_the_index_is_named_once(
    artifact: Path, capsys: pytest.CaptureFixture[str], other: str, every: bool
) -> None:
    def change(index: dict[str, Any]) -> None:
        names = [name for name, file in index["weight_map"].items() if file == SHARD]
        for name in names if every else names[:1]:
            index["weight_map"][name] = other.format(SHARD)

    edit_json(artifact, INDEX, change)
    code, differences = judged(capsys, artifact)
    named = [d for d in differences if d["check"] == "index"]
    assert (code, len(named), named[0]["file"]) == (3, 1, INDEX)
    assert repr(other.format(SHARD)) in named[0]["found"]


# ------------------------------------------------------------------------------------------------ headers


def _with_header(root: Path, change: Callable[[str], str]) -> None:
    shard = root / SHARD
    raw = shard.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = change(raw[8:end].decode().strip()).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


@pytest.mark.parametrize("metadata", ['{"a": 1}', '{"a": null}', '{"a": {"b": "c"}}', "[]", '"x"', "3", '{"a": ["b"]}'])
def test_metadata_that_safetensors_refuses_is_named(
    artifact: Path, capsys: pytest.CaptureFixture[str], metadata: str
) -> None:
    _with_header(artifact, lambda text: f'{{"__metadata__": {metadata}, {text[1:]}')
    code, differences = judged(capsys, artifact, "--deep")
    assert (code, [(d["check"], d["file"]) for d in differences]) == (3, [("headers", SHARD)])


@pytest.mark.parametrize("metadata", ["{}", "null", '{"format": "pt"}'])
def test_metadata_that_safetensors_takes_is_fine(
    artifact: Path, capsys: pytest.CaptureFixture[str], metadata: str
) -> None:
    _with_header(artifact, lambda text: f'{{"__metadata__": {metadata}, {text[1:]}')
    assert judged(capsys, artifact, "--deep") == (0, [])


@pytest.mark.parametrize("extra", ['"__metadata__": {"a": "b", "a": "c"}', '"\\ud800": {}', '"x": {"dtype": NaN}'])
def test_json_that_safetensors_does_not_read_is_named(
    artifact: Path, capsys: pytest.CaptureFixture[str], extra: str
) -> None:
    _with_header(artifact, lambda text: f"{{{extra}, {text[1:]}")
    code, differences = judged(capsys, artifact)
    assert (code, [(d["check"], d["file"]) for d in differences]) == (3, [("headers", SHARD)])


def test_a_tensor_that_a_header_names_twice_is_told(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def twice(text: str) -> str:
        name, entry = next((n, e) for n, e in json.loads(text).items() if n != "__metadata__")
        return f"{{{json.dumps(name)}: {json.dumps(entry)}, {text[1:]}"

    _with_header(artifact, twice)
    code, differences = judged(capsys, artifact)
    assert (code, [(d["check"], d["file"]) for d in differences]) == (3, [("headers", SHARD)])


# ------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "recipe.yaml", "tokenizer.json", SHARD, "README.md", "encoding/x.py"]
)
@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_any_file_that_others_cannot_read_is_named(
    artifact: Path, capsys: pytest.CaptureFixture[str], name: str, mode: int
) -> None:
    (artifact / name).parent.mkdir(exist_ok=True)
    if not (artifact / name).exists():
        (artifact / name).write_text("")
    (artifact / name).chmod(mode)
    code, (difference,) = judged(capsys, artifact)
    assert (code, difference["file"], difference["found"]) == (3, name, f"{mode:04o}")


def test_a_folder_that_others_cannot_enter_is_named(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "encoding").mkdir(mode=0o700)
    code, (difference,) = judged(capsys, artifact)
    assert (code, difference["file"], difference["found"]) == (3, "encoding", "0700")


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("value", [["DeepseekV3ForCausalLM"], [], "DeepseekV4ForCausalLM", None])
def test_another_architecture_is_named_with_and_without_a_source(
    artifact: Path, source: Path, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    edit_json(artifact, "config.json", lambda config: config.update(architectures=value))
    for arguments in ((), ("--source", source)):
        code, (difference,) = judged(capsys, artifact, *arguments)
        assert (code, difference["file"]) == (3, "config.json")
        assert difference["expected"].startswith("architectures: ['DeepseekV4ForCausalLM']")


@pytest.mark.parametrize("ratios", [[0, 4, 128], [0, 4, 128, 4], [0, 4, 128, 128]])
def test_the_ratio_of_a_draft_layer_is_checked_with_and_without_a_source(
    artifact: Path, source: Path, capsys: pytest.CaptureFixture[str], ratios: list[int]
) -> None:
    edit_json(artifact, "config.json", lambda config: config.update(compress_ratios=ratios))
    for arguments in ((), ("--source", source)):
        code, (difference,) = judged(capsys, artifact, *arguments)
        assert (code, difference["file"], "compress_ratios" in difference["expected"]) == (3, "config.json", True)


def test_one_ratio_too_many_leaves_no_draft_to_judge(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(artifact, "config.json", lambda config: config["compress_ratios"].append(0))
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert (stopped.value.code, error["where"].rpartition(": ")[2]) == (1, "compress_ratios"), error


@pytest.mark.parametrize("key", [*sorted(set(maker.CONFIG) - {"model_type", "compress_ratios"}), "rope_theta"])
def test_every_key_of_config_json_is_compared(
    artifact: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    other = maker.copy(source, tmp_path / "source")
    value = maker.CONFIG.get(key, 10000)
    edit_json(other, "config.json", lambda config: config.update({key: value}))
    edit_json(artifact, "config.json", lambda config: config.update({key: value}))
    assert judged(capsys, artifact, "--source", other) == (0, [])
    different = value + 1 if isinstance(value, int) else ["Other"]
    edit_json(other, "config.json", lambda config: config.update({key: different}))
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--source", str(other), "--json"])
    result = json.loads(capsys.readouterr().out)
    named = {d["expected"].partition(":")[0] for d in result.get("differences", []) if d["file"] == "config.json"}
    assert (stopped.value.code, key in named) == (3, True)


@pytest.mark.parametrize("value", [1.0, True, "1"])
def test_a_number_is_not_equal_to_another_kind_of_json(
    artifact: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    other = maker.copy(source, tmp_path / "source")
    edit_json(other, "config.json", lambda config: config.update(num_key_value_heads=1))
    edit_json(artifact, "config.json", lambda config: config.update(num_key_value_heads=value))
    code, (difference,) = judged(capsys, artifact, "--source", other)
    assert (code, difference["expected"], difference["found"]) == (3, "num_key_value_heads: 1", repr(value))


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("name", ["mtp.0.head.weight", "mtp.0.emb.tok_emb.weight"])
@pytest.mark.parametrize("place", ["same shard", "another shard"])
def test_a_copy_that_differs_is_found_without_a_source(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.setattr("dsv4q.verify.untouched.PIECE", 256)
    if place == "same shard":
        maker.move(artifact, name, json.loads((artifact / INDEX).read_text())["weight_map"]["head.weight"])
    assert judged(capsys, artifact, "--deep") == (0, [])
    weight = read(artifact)[name].contiguous()
    weight.view(torch.uint8)[-1, -1] ^= 1
    edit(artifact, {name: weight})
    code, (difference,) = judged(capsys, artifact, "--deep")
    assert (code, difference["check"], difference["tensor"]) == (3, "bytes", name)


# ------------------------------------------------------------------------------------------------ not an artifact


def test_a_release_in_its_own_layout_is_refused_as_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = tmp_path / "re lease"
    write_toy(release, form=native_form())
    for more in ([], ["--deep"], ["--source", str(release)]):
        with pytest.raises(SystemExit) as stopped:
            main(["verify-shards", str(release), *more])
        said = capsys.readouterr().err
        assert stopped.value.code == 1 and "in DeepSeek's own layout, of which artifacts are made" in said
        assert f"`dsv4q plan '{release}'` looks it over" in said


def test_an_artifact_that_calls_itself_a_release_is_judged(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(artifact, "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    code, differences = judged(capsys, artifact)
    assert code == 3 and differences
