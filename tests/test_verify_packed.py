"""Packed native weights against packed stored ones: what is shown equal decodes to equal bits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import artifact_maker as maker
import runs
from artifact_maker import edit, read
from dsv4q.__main__ import main
from dsv4q.formats.encode import fp8_block_decode, nvfp4_decode
from dsv4q.formats.native import fp8_to_bf16, mxfp4_to_bf16
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.packed import equal_fp8, equal_mxfp4

EXPERT = "layers.1.ffn.experts.2"
E8M0 = torch.float8_e8m0fnu


def _same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Bool [T]."""
    return (one.float().view(torch.int32) == other.float().view(torch.int32)).flatten(1).all(dim=1)


def everywhere(shows: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What a function shows on the CPU; a GPU, if there is one, shows the same."""
    found = shows(*tensors)
    if torch.cuda.is_available():
        assert torch.equal(found, shows(*(tensor.cuda() for tensor in tensors)).cpu())
    return found


# ------------------------------------------------------------------------------------------------ E2M1


@pytest.mark.parametrize("times", range(-5, 6))
def test_of_every_pair_of_nibbles_those_are_equal_that_decode_to_equal_bits(times: int) -> None:
    one, other = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    one, other = (side.flatten().to(torch.uint8) for side in (one, other))
    packed, stored = torch.zeros(2, len(one), 1, 16, dtype=torch.uint8)
    packed[:, 0, 9], stored[:, 0, 9] = one, other  # in the second of two blocks of 16, one MXFP4 block
    scale = torch.full((len(one), 1, 1), 127 + times, dtype=torch.uint8).view(E8M0)
    block_scale = torch.tensor([2.0, 0.25]).to(torch.float8_e4m3fn).expand(len(one), 1, 2)
    global_scale = torch.full((len(one), 1), 0.25)
    found = everywhere(equal_mxfp4, packed, scale, stored, block_scale.contiguous(), global_scale)
    decoded = nvfp4_decode(stored, block_scale.contiguous(), global_scale)
    assert torch.equal(found, _same_bits(mxfp4_to_bf16(packed, scale), decoded))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_shown_equal_decodes_to_equal_bits_whatever_the_scales(data: st.DataObject) -> None:
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=32, max_size=32))).to(torch.uint8)
    packed, stored = codes.view(1, 2, 16), codes.clone().view(1, 2, 16)
    scale = torch.tensor(data.draw(st.lists(st.integers(0, 254), min_size=2, max_size=2))).to(torch.uint8)
    block = torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=4, max_size=4))).to(torch.uint8)
    block_scale = block.view(torch.float8_e4m3fn).view(1, 2, 2)
    global_scale = torch.tensor([[data.draw(st.sampled_from([1.0, 0.5, 2.0**-100, 2.0**126, 3.0, 0.0, float("nan")]))]])
    shown = equal_mxfp4(packed, scale.view(E8M0).view(1, 2, 1), stored, block_scale, global_scale)
    if bool(shown):
        weight = mxfp4_to_bf16(packed, scale.view(E8M0).view(1, 2, 1))
        decoded = nvfp4_decode(stored, block_scale, global_scale)
        assert bool(_same_bits(weight, decoded)) and bool(decoded.isfinite().all())


def test_zeros_are_equal_under_any_scales_and_their_signs_count() -> None:
    packed = torch.tensor([0x80, 0x08], dtype=torch.uint8).repeat(8).view(1, 1, 16)
    scale = torch.tensor([[[200]]], dtype=torch.uint8).view(E8M0)
    ones = torch.ones(1, 1, 2).to(torch.float8_e4m3fn), torch.ones(1, 1)
    assert bool(equal_mxfp4(packed, scale, packed.clone(), *ones))
    assert not bool(equal_mxfp4(packed, scale, torch.zeros_like(packed), *ones))


# ------------------------------------------------------------------------------------------------ E4M3


@pytest.mark.parametrize("times", range(-18, 19))
def test_every_e4m3_value_has_the_one_code_that_decodes_to_equal_bits(times: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float() * 2.0**times
    stored = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
    weight, scale = codes.view(torch.float8_e4m3fn).view(256, 1, 1), torch.full((256, 1, 1), 127 + times)
    scale, block_scale = scale.to(torch.uint8).view(E8M0), torch.ones(256, 1, 1, dtype=torch.bfloat16)
    found = everywhere(equal_fp8, weight, scale, stored.view(256, 1, 1), block_scale)
    there = (stored.float().view(torch.int32) == numbers.view(torch.int32)) & ~numbers.isnan()
    assert torch.equal(found, there)
    beside = (stored.view(torch.uint8) ^ 1).view(torch.float8_e4m3fn).view(256, 1, 1)
    assert not bool(equal_fp8(weight, scale, beside, block_scale).any())


@pytest.mark.parametrize("shape", [(128, 128), (130, 260), (40, 64)])
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32])
def test_fp8_blocks_are_compared_each_under_its_own_scales(shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(shape, generator=generator) * 8).to(torch.float8_e4m3fn)
    squares = (-(-shape[0] // 128), -(-shape[1] // 128))
    exponent = torch.randint(-3, 3, squares, generator=generator)
    scale = torch.exp2(exponent.float()) if scale_dtype == torch.float32 else (exponent + 127).to(torch.uint8)
    block_scale = torch.exp2(exponent.float() + 1)
    block_scale[0, 0] /= 2
    wide = block_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    reference = fp8_to_bf16(weight, scale).float()
    stored = (reference / wide).to(torch.float8_e4m3fn)
    exact = bool(_same_bits(reference[None], fp8_block_decode(stored, block_scale)[None]))
    arguments = weight[None], scale[None], stored[None], block_scale[None]
    assert bool(everywhere(equal_fp8, *arguments)) == exact
    stored.view(torch.uint8)[-1, -1] ^= 0x80
    assert not bool(equal_fp8(*arguments))


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy in DeepSeek's own layout and the artifact that a run makes of it."""
    folder = tmp_path_factory.mktemp("native")
    write_toy(folder / "source", ToyConfig(), seed=0, form=native_form())
    runs.run(runs.toy_job(folder, make=False))
    return folder / "source", folder / "out"


@pytest.fixture
def artifact(native: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    yield maker.copy(native[1], tmp_path / "artifact")


def judged(capsys: pytest.CaptureFixture[str], artifact: Path, source: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the real command."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--deep", "--source", str(source), "--device", "cpu", "--json"])
    return stopped.value.code or 0, json.loads(capsys.readouterr().out)  # type: ignore[return-value]


def test_an_exact_artifact_of_a_native_source_is_exact_without_a_look_at_single_linears(
    native: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a linear was widened")

    monkeypatch.setattr("dsv4q.verify.linear.Linear.load", never)
    code, result = judged(capsys, native[1], native[0])
    assert (code, result["differences"]) == (0, [])
    assert result["exactness"]["exact"] == result["exactness"]["tensors"] > 0


@pytest.mark.parametrize("bit", [0, 3, 4, 7])
@pytest.mark.parametrize(
    "name", [f"{EXPERT}.w1.weight_packed", f"{EXPERT}.w2.weight_scale", "layers.0.attn.wkv.weight"]
)
def test_a_flipped_bit_is_named_against_a_native_source(
    native: tuple[Path, Path], artifact: Path, capsys: pytest.CaptureFixture[str], name: str, bit: int
) -> None:
    tensor = read(artifact)[name]
    tensor.view(torch.uint8)[1, 2] ^= 1 << bit
    edit(artifact, {name: tensor})
    code, result = judged(capsys, artifact, native[0])
    assert code == 3
    assert {d["tensor"].rpartition(".")[0] for d in result["differences"]} == {name.rpartition(".")[0]}


def test_scales_and_codes_moved_by_a_power_of_two_are_still_exact(
    native: tuple[Path, Path], artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, module = read(artifact), f"{EXPERT}.w2"
    changed = {f"{module}.weight_global_scale": stored[f"{module}.weight_global_scale"] / 2}
    scale = stored[f"{module}.weight_scale"].float() / 2
    assert float(scale.min()) >= 2.0**-9, "no room below"
    edit(artifact, changed | {f"{module}.weight_scale": scale.to(torch.float8_e4m3fn)})
    code, result = judged(capsys, artifact, native[0])
    assert (code, result["differences"]) == (0, [])
    assert result["exactness"]["exact"] == result["exactness"]["tensors"]


def test_the_last_line_says_how_fast_bytes_were_read(
    native: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["verify-shards", str(native[1]), "--deep", "--source", str(native[0])])
    last = capsys.readouterr().out.splitlines()[-1]
    _, result = judged(capsys, *reversed(native))
    stored = sum(p.stat().st_size for root in native for p in root.glob("*.safetensors"))
    assert re.search(r": as it must be; [\d.]+ [kM]B read at [\d.]+ GB/s; against ", last)
    assert 0.95 * stored < result["bytes_read"] < 1.05 * stored


def test_a_thread_that_computes_alone_leaves_other_threads_as_they_are() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor as Pool; import torch; from dsv4q.host import *\n"
        "def number(_): return torch.get_num_threads()\n"
        "with Pool(2, initializer=compute_alone) as alone, Pool(2) as usual:\n"
        "    print(*set(alone.map(number, range(8))), *set(usual.map(number, range(8))), number(0))"
    )
    many = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=many, capture_output=True, text=True, check=True)
    alone, usual, here = map(int, done.stdout.split())
    assert (alone, usual) == (1, here)
