"""Weights of a damaged source: they are named, and no artifact is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from runs import CONFIGS
from users import calibrated, config, dsv4q, edit, shard_of, small_source


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("weights") / "source")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def refused(source: Path, settings: Path, name: str, *words: str) -> None:
    """Quantizing ends with an error that names the tensor."""
    said = dsv4q("quantize", source, source.parent / "out", "-c", settings, "--device", "cpu")
    assert said.code == 1
    assert name in said.err
    for word in words:
        assert word in said.err


@pytest.mark.parametrize("make", [config, calibrated])
@pytest.mark.parametrize(
    "name",
    [
        "layers.1.ffn.experts.2.w2.weight", "layers.0.attn.wkv.weight", "layers.1.attn_norm.weight", "norm.weight",
        "embed.weight", "head.weight", "mtp.0.ffn.experts.0.w1.weight", "mtp.0.enorm.weight",
        "layers.0.ffn.shared_experts.w1.weight", "layers.0.ffn.gate.weight",
    ],
)  # fmt: skip
def test_a_weight_or_norm_of_zeros_is_named(
    name: str, make: Callable[[Path], Path], source: Path, tmp_path: Path
) -> None:
    edit(source, name, torch.Tensor.zero_)
    refused(source, make(tmp_path), name, "zeros", shard_of(source, name).name)


def test_biases_may_be_zeros(source: Path, tmp_path: Path) -> None:
    edit(source, "layers.1.ffn.gate.bias", torch.Tensor.zero_)
    edit(source, "layers.1.attn.attn_sink", torch.Tensor.zero_)
    out = tmp_path / "out"
    assert dsv4q("quantize", source, out, "-c", config(tmp_path), "--device", "cpu").code == 0


def test_a_download_that_stopped_within_the_last_tensor_is_named_by_the_plan(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[-1]
    raw = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(len(raw) - 5000)
        file.write(bytes(5000))
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert "zeros" in said.err
    assert shard.name in said.err


def test_dequantize_names_a_weight_of_zeros(tmp_path: Path) -> None:
    source = small_source(tmp_path / "native", native=True)
    name = "layers.1.ffn.experts.2.w2.weight"
    edit(source, name, torch.Tensor.zero_)
    said = dsv4q("dequantize", source, tmp_path / "out")
    assert said.code == 1
    assert name in said.err


@pytest.mark.parametrize("make", [config, calibrated])
@pytest.mark.parametrize(
    "name",
    [
        "layers.1.ffn.experts.2.w1.weight", "layers.1.ffn.experts.2.w3.weight", "layers.1.ffn.experts.2.w2.weight",
        "layers.0.attn.wq_b.weight", "layers.1.ffn_norm.weight", "embed.weight", "mtp.0.e_proj.weight",
        "layers.0.ffn.shared_experts.w2.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [1e30, -3e38])
def test_one_huge_value_is_named(
    value: float, name: str, make: Callable[[Path], Path], source: Path, tmp_path: Path
) -> None:
    edit(source, name, lambda tensor: tensor.view(-1)[3].fill_(value))
    refused(source, make(tmp_path), name, shard_of(source, name).name)


LARGE = {
    "nvfp4-fp8-mtp": ("layers.1.ffn.experts.2.w1.weight", "layers.1.ffn.experts.2.w3.weight"),
    "nvfp4-fp8-mtp-minmax": ("layers.1.ffn.experts.2.w2.weight",),
    "w4a16-fp8-mtp": ("layers.0.attn.wkv.weight",),
}


@pytest.mark.parametrize("name", list(LARGE))
def test_a_value_that_erases_the_others_under_its_scale_is_said(name: str, source: Path, tmp_path: Path) -> None:
    edit(source, LARGE[name][0], lambda tensor: tensor.view(-1)[3].fill_(1e9))
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["recipe"]
    bound = None if name.startswith("w4a16") else "bound"
    settings = config(tmp_path, recipe=recipe, activations=bound)
    said = dsv4q("quantize", source, tmp_path / "out", "-c", settings, "--device", "cpu")
    assert said.code == 0
    assert "nan" not in said.out
    warnings = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert [warning["where"] for warning in warnings] == list(LARGE[name])
    for weight in LARGE[name]:
        assert f"Most of a weight is stored as zero: {weight}" in said.err


def test_nothing_is_said_of_a_sound_source(source: Path, tmp_path: Path) -> None:
    said = dsv4q("quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu")
    assert said.code == 0
    assert "warning" not in said.err


@pytest.mark.parametrize("make", [config, calibrated])
@pytest.mark.parametrize("value", [4, 1 << 40, -1])
def test_a_routing_table_beyond_the_experts_is_named_before_the_run(
    value: int, make: Callable[[Path], Path], source: Path, tmp_path: Path
) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    edit(source, name, lambda table: table[5, 1].fill_(value))
    refused(source, make(tmp_path), name, "experts 0 to 3", f"{value:,}")
    assert not (tmp_path / "out").exists()


def test_a_routing_table_of_zeros_is_named(source: Path, tmp_path: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    edit(source, name, torch.Tensor.zero_)
    refused(source, config(tmp_path), name, "zeros")
