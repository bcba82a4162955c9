"""The judge never falls: numbers out of all bounds, sources that break meanwhile, sources that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import artifact_maker as maker
import runs
from artifact_maker import INDEX, edit, read
from dsv4q.__main__ import main
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.source import compare_folders

EXPERT = "layers.1.ffn.experts.2"
SHARED = "layers.1.ffn.shared_experts.w1.weight"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def tensors() -> maker.Tensors:
    return maker.random_source()


@pytest.fixture(scope="module")
def source(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.write_source(tmp_path_factory.mktemp("source") / "bf16", tensors)


@pytest.fixture(scope="module")
def made(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.write_artifact(tmp_path_factory.mktemp("made") / "nvfp4", tensors)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy in DeepSeek's own layout and its artifact."""
    folder = tmp_path_factory.mktemp("native")
    write_toy(folder / "source", ToyConfig(), seed=0, form=native_form())
    runs.run(runs.toy_job(folder, make=False))
    return folder / "source", folder / "out"


def _no_constant(constant: str) -> object:
    raise AssertionError(f"{constant} is not JSON")


def judged(capsys: pytest.CaptureFixture[str], artifact: Path, source: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the real command, whose JSON is strict."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--deep", "--source", str(source), "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=_no_constant)
    return stopped.value.code or 0, found  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("value", [1e-40, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("kind", ["weight_global_scale", "weight_scale"])
def test_a_scale_out_of_all_bounds_is_a_difference_and_the_worst_error(
    made: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, value: float
) -> None:
    artifact = maker.copy(made, tmp_path / "a")
    name = f"{EXPERT}.w2.{kind}" if kind == "weight_global_scale" else f"layers.1.attn.wq_b.{kind}"
    edit(artifact, {name: torch.full_like(read(artifact)[name], value)})
    code, result = judged(capsys, artifact, source)
    assert code == 3
    module = name.rpartition(".")[0]
    assert {d["tensor"].rpartition(".")[0] for d in result["differences"]} == {module}
    role = "routed expert" if "experts" in name else "attention projection"
    assert result["errors"][role]["worst"] == module


def test_nan_is_the_worst_error(made: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, name = maker.copy(made, tmp_path / "a"), "layers.1.attn.wq_b.weight"
    weight = read(artifact)[name]
    weight.view(torch.uint8)[1, 1] = 0x7F
    edit(artifact, {name: weight})
    code, result = judged(capsys, artifact, source)
    errors = result["errors"]["attention projection"]
    assert (code, errors["worst"]) == (3, "layers.1.attn.wq_b")
    assert errors["max_abs_error"] is errors["max_relative_error"] is errors["mean_relative_error"] is None


def test_squares_of_large_weights_are_added_in_f64(
    tensors: maker.Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "layers.1.attn.wq_b.weight"
    weights = {**tensors, name: (tensors[name].float() * 1e25).to(torch.bfloat16)}
    source = maker.write_source(tmp_path / "source", weights)
    artifact = maker.write_artifact(tmp_path / "out", weights)
    code, result = judged(capsys, artifact, source)
    assert (code, result["differences"]) == (0, [])
    assert 0 < result["errors"]["attention projection"]["max_relative_error"] < 0.03


# ------------------------------------------------------------------------------------------------ a source that breaks


@pytest.mark.parametrize("name", [f"{EXPERT}.w1.scale", "layers.1.attn.wkv.weight", SHARED])
def test_a_weight_of_a_native_source_that_is_no_number_is_a_difference_of_that_tensor(
    native: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source, artifact = maker.copy(native[0], tmp_path / "source"), maker.copy(native[1], tmp_path / "a")
    damaged = read(source)[name]
    damaged.view(torch.uint8).view(-1)[3] = 0xFF
    edit(source, {name: damaged})
    planted = f"{EXPERT}.w2.weight_packed"
    packed = read(artifact)[planted]
    packed[0, 0] ^= 1
    edit(artifact, {planted: packed})
    code, result = judged(capsys, artifact, source)
    assert code == 3
    weight = f"{name.rpartition('.')[0]}.weight"
    assert {(d["check"], d["tensor"]) for d in result["differences"]} == {("source", weight), ("encoding", planted)}


def test_a_source_that_is_cut_off_meanwhile_loses_only_what_was_cut_off(
    made: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, broken = maker.copy(made, tmp_path / "a"), maker.copy(source, tmp_path / "source")
    weight_map = json.loads((broken / INDEX).read_text())["weight_map"]
    embed = read(artifact)["embed.weight"]
    assert weight_map["embed.weight"] != SECOND
    embed.view(torch.uint8)[0, 0] ^= 1
    edit(artifact, {"embed.weight": embed})

    def cut(case: Any) -> None:
        compare_folders(case)
        raw = (broken / SECOND).read_bytes()
        (broken / SECOND).write_bytes(raw[: len(raw) // 2])

    monkeypatch.setattr("dsv4q.verify.judge.compare_folders", cut)
    code, result = judged(capsys, artifact, broken)
    found = {(d["check"], d["tensor"]) for d in result["differences"]}
    lost = {name for name, file in weight_map.items() if file == SECOND}
    assert (code, ("bytes", "embed.weight") in found) == (3, True)
    assert {tensor for check, tensor in found if check == "source" and tensor in weight_map} == lost
    assert result["checks"]["encoding"] > 0


def test_an_artifact_that_is_cut_off_meanwhile_keeps_what_was_found(
    made: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = maker.copy(made, tmp_path / "a")
    shard = artifact / "model-00003-of-00003.safetensors"

    def cut(case: Any) -> None:
        compare_folders(case)
        shard.write_bytes(shard.read_bytes()[:-1000])

    monkeypatch.setattr("dsv4q.verify.judge.compare_folders", cut)
    code, result = judged(capsys, artifact, source)
    assert code == 3
    assert {d["check"] for d in result["differences"]} == {"values"}
    assert result["checks"]["encoding"] > 0


# ------------------------------------------------------------------------------------------------ a source that is none


def _garbage(root: Path) -> None:
    for shard in root.glob("*.safetensors"):
        shard.write_bytes(b"\0" * 100)


def _pointers(root: Path) -> None:
    for shard in root.glob("*.safetensors"):
        shard.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")


def _config_alone(root: Path) -> None:
    for path in root.iterdir():
        if path.name != "config.json":
            path.unlink()


def _no_shards(root: Path) -> None:
    for shard in root.glob("*.safetensors"):
        shard.unlink()


def _other_names(root: Path) -> None:
    edit(root, {name: None for name in read(root)} | {f"model.{name}": t for name, t in read(root).items()})


@pytest.mark.parametrize("damage", [_garbage, _pointers, _config_alone, _no_shards, _other_names])
def test_a_source_of_which_nothing_can_be_read_is_refused(
    made: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    broken = maker.copy(source, tmp_path / "source")
    damage(broken)
    code, result = judged(capsys, made, broken)
    assert (code, result["error"]["kind"]) == (1, "SourceError")
    assert str(broken) in str(result["error"])


def test_an_artifact_given_as_source_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = judged(capsys, made, made)
    assert (code, result["error"]["kind"]) == (1, "SourceError")
    assert "artifact" in result["error"]["what"]
