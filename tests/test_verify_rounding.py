"""Artifacts that a GPU made: codes that another rounding of the division gives are right, any other is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from torch import Tensor

import artifact_maker as maker
import runs
from artifact_maker import edit, read
from dsv4q.__main__ import main

WQ_B, EXPERT = "layers.1.attn.wq_b", "layers.1.ffn.experts.2.w1"


@pytest.fixture(scope="module")
def tensors() -> maker.Tensors:
    return maker.random_source()


@pytest.fixture(scope="module")
def source(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.write_source(tmp_path_factory.mktemp("source") / "bf16", tensors)


@pytest.fixture(scope="module", params=["nvfp4", "int4"])
def by_kernels(
    request: pytest.FixtureRequest, tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every quantized weight encoded as compressed-tensors' Triton kernel does: in F32, `div_rn`, without a BF16."""
    root = maker.write_artifact(tmp_path_factory.mktemp("gpu") / "out", tensors, experts=request.param)
    stored, changes = read(root), {}
    for name in stored:
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_scale":
            form = "packed" if f"{module}.weight_packed" in stored else "fp8"
            encode = {"fp8": _fp8, "packed": _nvfp4 if request.param == "nvfp4" else _int4}[form]
            changes |= encode(module, stored, tensors[f"{module}.weight"].float())
    moved = {name for name, tensor in changes.items() if not torch.equal(_raw(tensor), _raw(stored[name]))}
    assert any(name.endswith(".weight") for name in moved), "both roundings give the same codes"
    edit(root, changes)
    return root


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _fp8(module: str, stored: maker.Tensors, weight: Tensor) -> maker.Tensors:
    scale = stored[f"{module}.weight_scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    quotient = weight / scale[: weight.shape[0], : weight.shape[1]]
    return {f"{module}.weight": quotient.clamp(-448, 448).to(torch.float8_e4m3fn)}


def _nvfp4(module: str, stored: maker.Tensors, weight: Tensor) -> maker.Tensors:
    scale = stored[f"{module}.weight_scale"].float() / stored[f"{module}.weight_global_scale"]
    quotient = weight / scale.repeat_interleave(16, 1)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middle = (grid[1:] + grid[:-1]) / 2
    magnitude = quotient.abs()
    down = torch.searchsorted(middle, magnitude)
    up = torch.searchsorted(middle, magnitude, right=True)
    code = torch.where(down % 2 == 0, down, up)  # a tie goes to the even code
    return {f"{module}.weight_packed": pack_fp4_to_uint8(torch.copysign(grid[code], quotient))}


def _int4(module: str, stored: maker.Tensors, weight: Tensor) -> maker.Tensors:
    scale = stored[f"{module}.weight_scale"].float().repeat_interleave(maker.INT_GROUP, 1)
    codes = ((weight / scale).clamp(-8, 7).round() + 8).to(torch.uint8)
    return {f"{module}.weight_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int32)}


def judged(
    capsys: pytest.CaptureFixture[str], artifact: Path, source: Path, *arguments: str
) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the real command."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--deep", "--source", str(source), *arguments, "--json"])
    return stopped.value.code or 0, json.loads(capsys.readouterr().out)  # type: ignore[return-value]


def test_codes_of_a_quotient_that_was_not_rounded_to_bf16_are_right(
    by_kernels: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = judged(capsys, by_kernels, source)
    assert (code, result["differences"]) == (0, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", ["nvfp4-fp8-mtp-minmax", "w4a16-fp8-mtp", "nvfp4-fp8-mtp"])
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
def test_what_a_gpu_or_a_cpu_makes_is_as_it_must_be_to_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, made_on: str
) -> None:
    job = replace(runs.toy_job(tmp_path, config), device=made_on)
    runs.run(job)
    found = [judged(capsys, job.out, job.source, "--device", device)[1] for device in ("cpu", "cuda")]
    assert [result["differences"] for result in found] == [[], []]
    assert found[0]["checks"] == found[1]["checks"]


def _next_code(weight: Tensor) -> int:
    """Move one value that is far from the middle of two codes to the next one."""
    codes = weight.view(torch.uint8)
    codes[3, 5] += 1 if int(codes[3, 5] & 0x7F) < 0x70 else -1
    return 1


def _sign(weight: Tensor) -> int:
    weight.view(torch.uint8)[3, 5] ^= 0x80
    return 1


def _two_codes(weight: Tensor) -> int:
    codes = weight.view(torch.uint8)
    codes[3, 5:7] += torch.where(codes[3, 5:7] & 0x7F < 0x70, 2, -2).to(torch.uint8)
    return 2


@pytest.mark.parametrize("damage", [_next_code, _sign, _two_codes])
def test_among_codes_that_another_rounding_gives_each_wrong_one_is_counted(
    by_kernels: Path,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Tensor], int],
) -> None:
    artifact, name = maker.copy(by_kernels, tmp_path / "a"), f"{WQ_B}.weight"
    weight = read(artifact)[name]
    count = damage(weight)
    edit(artifact, {name: weight})
    code, result = judged(capsys, artifact, source)
    (difference,) = result["differences"]
    assert (code, difference["check"], difference["tensor"]) == (3, "encoding", name)
    assert difference["found"].startswith(f"{count} of {weight.numel():,} bytes differ, the first at [3, 5]")


def test_a_flipped_nibble_is_counted_alone(
    by_kernels: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, name = maker.copy(by_kernels, tmp_path / "a"), f"{EXPERT}.weight_packed"
    packed = read(artifact)[name]
    packed.view(torch.uint8)[4, 3] ^= 0x20
    edit(artifact, {name: packed})
    (difference,) = judged(capsys, artifact, source)[1]["differences"]
    assert (difference["check"], difference["tensor"]) == ("encoding", name)
    assert difference["found"].startswith("1 of ")
