"""DeepSeek's own layout as a source: exact values, the same artifact as from BF16, and every damage named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsv4q.__main__ import main
from dsv4q.checkpoint.against_layout import compare_with_layout
from dsv4q.checkpoint.folder import load_model_config
from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import FP8, MXFP4, NativeCheckpoint, as_source, open_source, release_form, scan_source
from dsv4q.checkpoint.pipes import Stopped
from dsv4q.checkpoint.source import INDEX, Checkpoint, scan
from dsv4q.config import load_config
from dsv4q.errors import SourceError, WeightError
from dsv4q.formats import native
from dsv4q.formats.native import decode_into, doubtful, fp8_to_bf16, mxfp4_to_bf16
from dsv4q.layout import DTYPE_BYTES, Dims, Role, TensorSpec, source_tensors
from dsv4q.made_up.native import codes_and_scales, grid_form, native_form, stored_specs
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.plan.plan import make_plan
from dsv4q.quantize import Job
from dsv4q.run import schedule
from dsv4q.run.memory import ExpertMemory, memory_maker, place_of
from dsv4q.verify.judge import verify
from runs import CONFIGS, FLASH, at_toy_size, finished_files, run

TINY = ToyConfig(
    hidden_size=128, n_routed_experts=2, compress_ratios=(4, 128), num_hash_layers=1, vocab_size=300, shards=3
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float64)


def codes(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint8))


def same_bits(found: torch.Tensor, true: Any) -> bool:
    """Whether BF16 values are the given float64 numbers, signs of zeros included."""
    return np.array_equal(found.to(torch.float64).numpy().view(np.int64), np.asarray(true, np.float64).view(np.int64))


def e4m3(code: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Value of E4M3 codes by the definition: bias 7, three bits of fraction, subnormals at 2^-9."""
    sign, exponent, fraction = np.where(code >> 7, -1.0, 1.0), (code >> 3 & 15).astype(int), (code & 7) / 8
    return sign * np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))


# ------------------------------------------------------------------------------------------------ values


def test_mxfp4_golden_bytes() -> None:
    packed = codes([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2])
    found = mxfp4_to_bf16(packed, codes([[128]]))
    assert found.view(torch.int16).tolist()[0][:16] == [
        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140,
        -0x8000, 0x3F80 - 0x8000, 0x4000 - 0x8000, 0x4040 - 0x8000, 0x4080 - 0x8000, 0x40C0 - 0x8000,
        0x4100 - 0x8000, 0x4140 - 0x8000,
    ]  # fmt: skip


def test_fp8_golden_bytes() -> None:
    weight = codes([[0x00, 0x80, 0x01, 0x38, 0x7E, 0xFE]]).view(torch.float8_e4m3fn)
    found = fp8_to_bf16(weight, codes([[126]]))
    assert same_bits(found, [[0.0, -0.0, 2.0**-10, 0.5, 224.0, -224.0]])


def test_low_nibble_is_the_even_column() -> None:
    assert mxfp4_to_bf16(codes([[0x21] + [0] * 15]), codes([[127]]))[0, :2].tolist() == [0.5, 1.0]


def test_each_scale_serves_32_columns_of_one_row() -> None:
    found = mxfp4_to_bf16(codes([[0x22] * 32] * 2), codes([[127, 128], [129, 130]]))
    assert found.tolist() == [[1.0] * 32 + [2.0] * 32, [4.0] * 32 + [8.0] * 32]


@pytest.mark.parametrize("code", range(255))
def test_every_mxfp4_value_is_exact_or_refused(code: int) -> None:
    byte = np.arange(256)
    true = E2M1[np.stack([byte & 15, byte >> 4], -1).reshape(1, -1)] * 2.0 ** (code - 127)
    holds = np.abs(true).max() < 2.0**128
    if holds:
        assert same_bits(mxfp4_to_bf16(codes([byte]), torch.full((1, 16), code, dtype=torch.uint8)), true)
    else:
        with pytest.raises(WeightError, match="not a BF16 number"):
            mxfp4_to_bf16(codes([byte]), torch.full((1, 16), code, dtype=torch.uint8))


@pytest.mark.parametrize("code", range(255))
def test_every_fp8_value_is_exact_or_refused(code: int) -> None:
    byte = np.array([b for b in range(256) if b & 0x7F != 0x7F])
    true = e4m3(byte)[None] * 2.0 ** (code - 127)
    nonzero = np.abs(true[true != 0])
    holds = nonzero.max() < 2.0**128 and nonzero.min() >= 2.0**-133
    weight, scale = codes([byte.tolist()]).view(torch.float8_e4m3fn), torch.full((1, 2), code, dtype=torch.uint8)
    if holds:
        assert same_bits(fp8_to_bf16(weight, scale), true)
    else:
        with pytest.raises(WeightError, match="not a BF16 number"):
            fp8_to_bf16(weight, scale)


def test_extreme_scale_of_values_that_bf16_holds_is_no_error() -> None:
    assert same_bits(mxfp4_to_bf16(codes([[0x12] + [0] * 15]), codes([[254]]))[:, :2], [[2.0**127, 2.0**126]])
    zeros = codes([[0x00, 0x80]]).view(torch.float8_e4m3fn)
    assert same_bits(fp8_to_bf16(zeros, codes([[254]])), [[0.0, -0.0]])


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), half=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_mxfp4_of_any_shape_is_value_times_scale(rows: int, half: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, half), dtype=np.uint8)
    scale = rng.integers(0, 253, (rows, -(-half // 16)), dtype=np.uint8)
    each = np.repeat(scale.astype(float), 32, 1)[:, : 2 * half]
    true = E2M1[np.stack([packed & 15, packed >> 4], -1).reshape(rows, -1)] * 2.0 ** (each - 127)
    assert same_bits(mxfp4_to_bf16(torch.from_numpy(packed), torch.from_numpy(scale)), true)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), wide=st.booleans())
def test_fp8_of_any_shape_is_value_times_scale(rows: int, columns: int, seed: int, wide: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 127, (rows, columns), dtype=np.uint8) | rng.integers(0, 2, (rows, columns)) << 7
    scale = rng.integers(3, 247, (-(-rows // 128), -(-columns // 128)), dtype=np.uint8)
    each = np.repeat(np.repeat(scale.astype(float), 128, 0), 128, 1)[:rows, :columns]
    given_scale = torch.from_numpy(np.exp2(scale.astype(np.float32) - 127) if wide else scale)
    found = fp8_to_bf16(torch.from_numpy(weight.astype(np.uint8)).view(torch.float8_e4m3fn), given_scale)
    assert same_bits(found, e4m3(weight) * 2.0 ** (each - 127))


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.integers(1, 300),
    columns=st.sampled_from([2, 32, 34, 126, 128, 130, 258]),
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["mxfp4", "fp8"]),
)
def test_a_weight_decoded_in_tiles_is_the_one_decoded_whole(
    lead: tuple[int, ...], rows: int, columns: int, seed: int, form: str
) -> None:
    rng = np.random.default_rng(seed)
    decode, width, scales = (
        (mxfp4_to_bf16, columns // 2, (rows, -(-columns // 32)))
        if form == "mxfp4"
        else (fp8_to_bf16, columns, (-(-rows // 128), -(-columns // 128)))
    )
    weight = codes(rng.integers(0, 127, (*lead, rows, width)))
    weight = weight if form == "mxfp4" else weight.view(torch.float8_e4m3fn)
    scale = codes(rng.integers(100, 150, (*lead, *scales)))
    whole = decode(weight, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_TOGETHER", {"cpu": 1000})
        assert torch.equal(decode(weight, scale).view(torch.int16), whole.view(torch.int16))


@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_nan_scale_is_refused_with_its_place(form: str) -> None:
    with pytest.raises(WeightError, match=r"A scale is NaN[\s\S]*layers.0.x[\s\S]*first at \[0, 1\]"):
        if form == "mxfp4":
            mxfp4_to_bf16(codes([[0] * 32]), codes([[0, 0xFF]]), "layers.0.x")
        else:
            fp8_to_bf16(codes([[0] * 200]).view(torch.float8_e4m3fn), codes([[0, 0xFF]]), "layers.0.x")


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_nan_fp8_value_is_refused(nan: int) -> None:
    with pytest.raises(WeightError, match="NaN or Inf"):
        fp8_to_bf16(codes([[0, nan]]).view(torch.float8_e4m3fn), codes([[127]]))


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, float("nan"), float("inf"), 2.0**-130])
def test_f32_scale_that_is_no_power_of_two_is_refused(scale: float) -> None:
    with pytest.raises(WeightError, match="not a power of two"):
        fp8_to_bf16(codes([[0x38]]).view(torch.float8_e4m3fn), torch.tensor([[scale]]))


def test_scale_that_would_broadcast_is_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"\[1, 1\], not \[2, 2\]"):
        mxfp4_to_bf16(codes([[0] * 32] * 2), codes([[127]]))
    with pytest.raises(ValueError, match=r"\[1, 1\], not \[2, 1\]"):
        fp8_to_bf16(codes([[0]] * 129).view(torch.float8_e4m3fn), codes([[127]]))


# ------------------------------------------------------------------------------------------------ toys


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The native toy and the grid toy, of the release and of Base."""
    folder = tmp_path_factory.mktemp(request.param)
    write_toy(folder / "native", TINY, 3, native_form(request.param))
    write_toy(folder / "grid", TINY, 3, grid_form(request.param))
    return folder / "native", folder / "grid"


def test_grid_toy_is_the_native_toy_dequantized(twins: tuple[Path, Path]) -> None:
    with open_source(twins[0]) as native, open_source(twins[1]) as grid:
        assert isinstance(native, NativeCheckpoint) and not isinstance(grid, NativeCheckpoint)
        assert native.tensors.keys() == grid.tensors.keys()
        for name, entry in grid.tensors.items():
            mine = native.tensors[name]
            assert (mine.dtype, mine.shape, mine.nbytes) == (entry.dtype, entry.shape, entry.nbytes)
            assert native.read(name) == grid.read(name), name


def test_every_way_to_read_gives_the_same_bytes(twins: tuple[Path, Path]) -> None:
    with open_source(twins[0]) as native:
        for name, entry in native.tensors.items():
            buffer = bytearray(entry.nbytes)
            native.read_into(name, memoryview(buffer))
            tensor = native.tensor(name)
            assert tuple(tensor.shape) == entry.shape
            assert native.read(name).tobytes() == bytes(buffer) == tensor.view(torch.uint8).numpy().tobytes()


def test_buffer_of_the_size_on_disk_is_a_defect_of_the_caller(twins: tuple[Path, Path]) -> None:
    with open_source(twins[0]) as native:
        name = "layers.0.attn.wq_a.weight"
        assert isinstance(native, NativeCheckpoint)
        with pytest.raises(ValueError, match="the buffer"):
            native.read_into(name, memoryview(bytearray(native.on_disk.tensors[name].nbytes)))


def test_native_toy_equals_the_layout(twins: tuple[Path, Path]) -> None:
    checkpoint = scan_source(twins[0])
    assert checkpoint.problems == ()
    assert compare_with_layout(checkpoint, TINY.dims) == []


def test_configs_of_the_twins_differ_in_quantization_config_alone(twins: tuple[Path, Path]) -> None:
    native, grid = (load_model_config(folder) for folder in twins)
    assert native.pop("quantization_config")["quant_method"] == "fp8"
    assert native == grid


def test_toy_on_the_grid_has_what_bites() -> None:
    specs = {s.name: s for s in source_tensors(ToyConfig().dims)}
    found: dict[str, list[bool]] = {"-0": [], "zero block": [], "spread": [], "slack": []}
    for name in ("layers.3.ffn.experts.5.w1.weight", "layers.1.ffn.experts.0.w2.weight"):
        packed, scale = codes_and_scales(specs[name], MXFP4, ToyConfig().dims, 0)
        nibbles = torch.stack((packed & 15, packed >> 4), -1).reshape(*scale.shape, 32)
        indices, used = nibbles & 7, (nibbles & 7).amax(-1) > 0
        found["-0"].append(bool((nibbles == 8).any()))
        found["zero block"].append(not bool(used.all()))
        found["spread"].append(int(scale[used].max()) - int(scale[used].min()) >= 8)
        found["slack"].append(bool((indices.amax(-1)[used] < 4).any()))
    assert all(all(seen) for seen in found.values()), found
    fp8 = [codes_and_scales(s, FP8, ToyConfig().dims, 0) for s in specs.values() if release_form(s) == FP8]
    raw = [weight.view(torch.uint8) for weight, _ in fp8]
    assert any(bool((r == 0x80).any()) for r in raw)
    assert any(bool(((r & 0x7F > 0) & (r & 0x7F < 8)).any()) for r in raw)
    squares = [part for r in raw for band in r.split(128) for part in band.split(128, dim=1)]
    assert any(not bool((square & 0x7F).any()) for square in squares)


def test_another_seed_gives_other_codes() -> None:
    spec = next(s for s in source_tensors(TINY.dims) if s.role == Role.ROUTED_EXPERT)
    one, other = (codes_and_scales(spec, MXFP4, TINY.dims, seed) for seed in (0, 1))
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_release_has_as_many_tensors_and_bytes_as_published() -> None:
    dims = Dims.from_config(json.loads(FLASH.read_text()))
    stored = [part for spec in source_tensors(dims) for part in stored_specs(spec)]
    assert len(stored) == 69_187
    assert sum(part.nbytes for part in stored) == 159_609_485_896
    assert sum(part.dtype == "I8" for part in stored) == 33_792
    assert sum(part.dtype == "F8_E4M3" for part in stored) == 375


# ------------------------------------------------------------------------------------------------ artifacts


def job(source: Path, out: Path, config: str) -> Job:
    return Job(source, out, at_toy_size(load_config(CONFIGS / f"{config}.yaml")), device="cpu")


@pytest.mark.parametrize("config", ["toy", "w4a16-fp8-mtp"])
def test_artifacts_of_native_and_grid_toy_are_the_same_bytes(
    twins: tuple[Path, Path], tmp_path: Path, config: str
) -> None:
    reports = [run(job(source, tmp_path / source.name, config)) for source in twins]
    files = finished_files(tmp_path / "native")
    assert files == finished_files(tmp_path / "grid")
    native, grid = ({f: (tmp_path / name / f).read_bytes() for f in files} for name in ("native", "grid"))
    cards = [re.sub(rb"## Source\n.*?(?=## )", b"", made.pop("README.md"), flags=re.DOTALL) for made in (native, grid)]
    assert native == grid
    assert cards[0] == cards[1]  # but for the source that they name
    assert [r["source"]["layout"] for r in reports] == ["native", "bf16"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A native toy, its artifact with the exact observers, the report."""
    folder = tmp_path_factory.mktemp("release")
    write_toy(folder / "source", TINY, 5, native_form())
    return folder / "source", folder / "out", run(job(folder / "source", folder / "out", "toy"))


def test_every_quantized_tensor_is_exact_bit_for_bit(release: tuple[Path, Path, dict[str, Any]]) -> None:
    errors = release[2]["errors"]
    assert {role: (e["exact"], e["tensors"]) for role, e in errors.items()} == {
        "routed expert": (12, 12),
        "attention projection": (10, 10),
    }


def test_compressed_tensors_own_decompressor_returns_the_source(release: tuple[Path, Path, dict[str, Any]]) -> None:
    source, out, _ = release
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    schemes = {group["format"]: QuantizationScheme.model_validate(group) for group in groups}
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for path in out.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            stored.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    with open_source(source) as checkpoint:
        quantized = [spec for spec in source_tensors(TINY.dims) if spec.is_quantizable]
        for spec in quantized:
            form = "nvfp4-pack-quantized" if spec.role == Role.ROUTED_EXPERT else "float-quantized"
            compressor = BaseCompressor.get_value_from_registry(form)
            weight = compressor.decompress(stored[spec.module], schemes[form])["weight"].to(torch.bfloat16)
            assert torch.equal(weight.view(torch.int16), checkpoint.tensor(spec.name).view(torch.int16)), spec.name
    assert len(quantized) == 22


def test_verify_accepts_the_native_source(release: tuple[Path, Path, dict[str, Any]]) -> None:
    result = verify(release[1], source=release[0], deep=True, progress=None)
    assert result.differences == ()
    assert all(stats["exact"] == stats["tensors"] for stats in result.errors.values())


@pytest.mark.parametrize(
    "name", ["layers.0.ffn.experts.1.w2.weight", "mtp.0.e_proj.scale", "layers.1.attn.wo_a.weight"]
)
def test_verify_names_what_differs_from_the_native_source(
    release: tuple[Path, Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    source = altered(release[0], tmp_path / "other", name, lambda raw: raw.__setitem__(0, raw[0] ^ 0x01))
    result = verify(release[1], source=source, deep=False, progress=None)
    module = name.rpartition(".")[0]
    assert {(d.tensor or "").rpartition(".")[0] for d in result.differences} == {module}


def test_verify_compares_what_a_truncated_native_source_still_has(
    release: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(release[0], source)
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with scan_source(source) as checkpoint:
        (lost,) = [name for name in checkpoint.tensors if not checkpoint.is_whole(name)]
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(release[1]), "--source", str(source), "--json"])
    result = json.loads(capsys.readouterr().out)
    (difference,) = result["differences"]
    assert (stopped.value.code, difference["check"], difference["file"]) == (3, "source", str(shard))
    assert difference["found"].endswith("; 1 of its tensors not compared; download this file again")
    whole = verify(release[1], source=release[0], deep=False, progress=None)
    lines = ("bytes", "encoding")
    assert sum(result["checks"][one] for one in lines) == sum(whole.checks[one] for one in lines) - 1, lost


def test_mtp_is_stored_as_bf16(release: tuple[Path, Path, dict[str, Any]]) -> None:
    with scan(release[1]) as artifact, open_source(release[0]) as source:
        names = [n for n in source.tensors if n.startswith("mtp.")]
        assert names and all(artifact.read(name) == source.read(name) for name in names)
        assert {artifact.tensors[n].dtype for n in names} == {"BF16", "F32"}


@pytest.mark.parametrize(
    ("code", "said"),
    [(0xFF, r"A scale is NaN[\s\S]*\[0, 2\]"), (0xFE, r"A dequantized value is not a BF16 number[\s\S]*\[0, 64\]")],
)
def test_a_scale_that_stands_for_no_number_stops_the_run_by_name_and_loses_nothing(
    release: tuple[Path, Path, dict[str, Any]], tmp_path: Path, code: int, said: str
) -> None:
    name = "layers.1.ffn.experts.1.w3.scale"
    shutil.copytree(release[0], tmp_path / "source")
    altered(release[0], tmp_path / "source", name, lambda raw: raw.__setitem__(2, code))
    altered(release[0], tmp_path / "source", name.replace(".scale", ".weight"), lambda raw: raw.__setitem__(32, 0x77))
    with pytest.raises(WeightError, match=said) as caught:
        run(job(tmp_path / "source", tmp_path / "out", "toy"))
    assert re.fullmatch(r"layers.1.ffn.experts.1.w3.weight in .*safetensors, .*w3.scale in .*", str(caught.value.where))
    done = (tmp_path / "out" / ".dsv4q").rglob("*")
    assert any("layers.0" in path.read_text(errors="ignore") for path in done if path.is_file())


# ------------------------------------------------------------------------------------------------ layout


def loaded_experts(source: Checkpoint, step: int) -> tuple[ExpertMemory, list[TensorSpec]]:
    """The routed experts of the first block, packed, of which `step` are had as BF16 at once."""
    dims = Dims.from_config(source.config)
    specs = [s for s in source_tensors(dims) if s.role == Role.ROUTED_EXPERT and s.block == "layers.0"]
    make = memory_maker(source, dims, [s.name for s in specs], torch.device("cpu"), packed=True, step=step)
    memory = make()
    for spec in specs:
        memory.place([spec], source.stored_together([spec.name]), lambda: False)
    memory.keep()
    memory.begin()
    return memory, specs


@pytest.mark.parametrize("step", [1, 2])
def test_experts_that_stay_packed_are_had_as_the_bf16_that_they_stand_for(twins: tuple[Path, Path], step: int) -> None:
    with open_source(twins[0]) as source:
        memory, specs = loaded_experts(source, step)
        for _ in range(2):  # as for a second micro-batch
            for spec in specs:
                stack, expert, projection = place_of(spec)
                part = next(part for part in memory.parts() if part.start <= expert < part.stop)
                found = memory.weights(stack, part)[expert - part.start, projection]
                assert torch.equal(found.view(torch.int16), source.tensor(spec.name).view(torch.int16)), spec.name


def test_of_packed_experts_the_one_with_a_nan_scale_is_told(
    release: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    bad = "layers.0.ffn.experts.1.w2"
    damaged = altered(release[0], tmp_path / "bad", f"{bad}.scale", lambda raw: raw.__setitem__(5, 0xFF))
    with open_source(damaged) as source:
        memory, specs = loaded_experts(source, 1)
        told = [s.name for s, fine in zip(specs, memory.fine(specs).tolist(), strict=True) if not fine]
    assert told == [f"{bad}.weight"]


def test_the_next_blocks_experts_wait_until_their_places_are_free(twins: tuple[Path, Path]) -> None:
    with open_source(twins[0]) as source, ThreadPoolExecutor(1) as loading:
        memory, specs = loaded_experts(source, 1)
        first, last = (next(s for s in specs if place_of(s)[:2] == ("down", e)) for e in (0, memory.experts - 1))
        before = memory.weights("down", slice(0, 1)).clone()
        changed = [part.view(torch.uint8) ^ 1 for part in source.stored_together([first.name])]
        waiting = loading.submit(memory.place, [first], changed, lambda: False)
        assert not wait([waiting], timeout=0.3).done
        assert torch.equal(memory.weights("down", slice(0, 1)), before)
        memory.release("down", 1)
        waiting.result(timeout=10)
        with pytest.raises(Stopped):
            memory.place([last], source.stored_together([last.name]), lambda: True)


def test_a_block_that_is_done_gives_nothing_of_the_next_one_away(twins: tuple[Path, Path]) -> None:
    with open_source(twins[0]) as source:
        memory, specs = loaded_experts(source, 2)
        for stack, part in (("gate_up", slice(0, 2)), ("down", slice(0, 2))):
            memory.weights(stack, part)  # all are decoded, so the next block may come in
        for spec in specs:
            memory.place([spec], source.stored_together([spec.name]), lambda: False)
        memory.keep()
        memory.release_all()
        with pytest.raises(Stopped):
            memory.place(specs[:1], source.stored_together([specs[0].name]), lambda: True)


@pytest.mark.parametrize("config", ["toy", "nvfp4-fp8-mtp-minmax"])
def test_experts_decoded_one_at_a_time_give_the_same_artifact(
    release: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    steps = []

    def one_at_a_time(*args: Any, step: int, **kwargs: Any) -> Callable[[], ExpertMemory]:
        steps.append(step)
        return memory_maker(*args, step=1, **kwargs)

    run(job(release[0], tmp_path / "all", config))
    monkeypatch.setattr(schedule, "memory_maker", one_at_a_time)
    run(job(release[0], tmp_path / "one", config))
    assert steps == [2]
    names = [name for name in finished_files(tmp_path / "all") if name.endswith(".safetensors")]
    assert names and all((tmp_path / "all" / n).read_bytes() == (tmp_path / "one" / n).read_bytes() for n in names)


@given(st.data())
def test_a_weight_beyond_doubt_is_decoded_and_never_refused(data: st.DataObject) -> None:
    is_fp8 = data.draw(st.booleans())
    scale = codes(data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 127, 245, 246, 247, 251, 252, 253, 254, 255]),
                                     min_size=2, max_size=2))).reshape(2, 1, 1)  # fmt: skip
    weight = codes(data.draw(st.lists(st.integers(0, 255), min_size=32, max_size=32))).reshape(2, 1, 16)
    weight = weight.view(torch.float8_e4m3fn) if is_fp8 else weight
    out = torch.empty((2, 1, 16 if is_fp8 else 32), dtype=torch.bfloat16)
    decode_into(weight, scale, out)
    for one in (~doubtful(weight, scale)).nonzero().flatten().tolist():
        true = (fp8_to_bf16 if is_fp8 else mxfp4_to_bf16)(weight[one], scale[one])
        assert torch.equal(out[one].view(torch.int16), true.view(torch.int16))


def altered(source: Path, out: Path, name: str, change: Callable[[bytearray], None]) -> Path:
    """A copy of a checkpoint in which one tensor's bytes are changed in place."""
    if not out.exists():
        shutil.copytree(source, out)
    entry = scan(out).tensors[name]
    with (out / entry.file).open("r+b") as file:
        file.seek(entry.start)
        raw = bytearray(file.read(entry.nbytes))
        change(raw)
        file.seek(entry.start)
        file.write(raw)
    return out


Headers = dict[str, tuple[str, tuple[int, ...]]]


def headers_of(toy: ToyConfig = TINY, expert_dtype: str = "fp4") -> Headers:
    parts = [part for spec in source_tensors(toy.dims) for part in stored_specs(spec, expert_dtype)]
    return {part.name: (part.dtype, part.shape) for part in parts}


def sparse(root: Path, headers: Headers, config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of true headers and holes for data, as a source."""
    (root / "config.json").write_text(json.dumps(TINY.as_config_json() if config is None else config))
    header, cursor = {}, 0
    for name, (dtype, shape) in headers.items():
        size = int(np.prod(shape)) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [cursor, cursor + size]}
        cursor += size
    text = json.dumps(header).encode()
    (root / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(root / "model.safetensors", 8 + len(text) + cursor)
    return scan_source(root)


def problems(root: Path, headers: Headers) -> list[SourceError]:
    checkpoint = sparse(root, headers)
    return [*checkpoint.problems, *compare_with_layout(checkpoint, TINY.dims)]


EXPERT, LINEAR = "layers.1.ffn.experts.1.w2", "layers.0.attn.wkv"
W2, WKV = (128, 64), (64, 128)
"""Shapes on disk of EXPERT (128 x 128, packed) and of LINEAR."""


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_headers_of_the_release_and_of_base_have_no_problem(tmp_path: Path, expert_dtype: str) -> None:
    assert problems(tmp_path, headers_of(TINY, expert_dtype)) == []


def test_u8_is_as_good_as_i8_and_e8m0(tmp_path: Path) -> None:
    renamed = {"I8": "U8", "F8_E8M0": "U8"}
    headers = {name: (renamed.get(dtype, dtype), shape) for name, (dtype, shape) in headers_of().items()}
    assert problems(tmp_path, headers) == []


def test_dequantized_draft_in_a_native_checkpoint_is_no_problem(tmp_path: Path) -> None:
    headers = {name: tensor for name, tensor in headers_of().items() if not name.startswith("mtp.")}
    headers |= {s.name: (s.dtype, s.shape) for s in source_tensors(TINY.dims) if s.is_mtp}
    assert problems(tmp_path, headers) == []


def test_linear_that_is_bf16_in_a_native_checkpoint_is_no_problem(tmp_path: Path) -> None:
    headers = headers_of()
    del headers[f"{LINEAR}.scale"]
    assert problems(tmp_path, {**headers, f"{LINEAR}.weight": ("BF16", WKV)}) == []


BAD: dict[str, tuple[Headers, tuple[str, ...]]] = {
    "MXFP4 scale missing": ({f"{EXPERT}.scale": ("", ())}, ("scale tensor of a packed MXFP4 weight is missing",)),
    "FP8 scale missing": ({f"{LINEAR}.scale": ("", ())}, ("scale tensor of an FP8 weight is missing",)),
    "MXFP4 scale of wrong shape": (
        {f"{EXPERT}.scale": ("F8_E8M0", (128, 8))},
        ("scale tensor of MXFP4 weights has a wrong shape", "[128, 4]", "[128, 8]"),
    ),
    "FP8 scale of wrong shape": (
        {f"{LINEAR}.scale": ("F8_E8M0", (1, 4))},
        ("scale tensor of FP8 weights has a wrong shape", "[1, 1]", "[1, 4]"),
    ),
    "MXFP4 scale of wrong dtype": (
        {f"{EXPERT}.scale": ("F32", (128, 4))},
        ("scale tensor of MXFP4 weights has a wrong dtype", "F8_E8M0 or U8", "F32"),
    ),
    "FP8 scale of wrong dtype": (
        {f"{LINEAR}.scale": ("BF16", (1, 1))},
        ("scale tensor of FP8 weights has a wrong dtype", "F8_E8M0 or U8 or F32", "BF16"),
    ),
    "packed data of odd width": (
        {f"{EXPERT}.weight": ("I8", (128, 63))},
        ("Packed MXFP4 data has a wrong width", "I8 [128, 64]", "[128, 63]"),
    ),
    "packed data not packed": (
        {f"{EXPERT}.weight": ("I8", (128, 128))},
        ("Packed MXFP4 data has a wrong width", "I8 [128, 64]", "[128, 128]"),
    ),
    "FP8 weight of wrong shape": (
        {f"{LINEAR}.weight": ("F8_E4M3", (64, 64))},
        ("An FP8 weight has a wrong shape", "F8_E4M3 [64, 128]"),
    ),
    "scale beside a BF16 weight": (
        {f"{LINEAR}.weight": ("BF16", WKV)},
        ("A weight that is not quantized has a scale tensor", "BF16 [64, 128]"),
    ),
    "one BF16 expert": (
        {f"{EXPERT}.weight": ("BF16", (128, 128)), f"{EXPERT}.scale": ("", ())},
        ("routed experts of layers.1 mix layouts", "all as MXFP4", "1 weights as BF16", f"{EXPERT}.weight"),
    ),
    "one FP8 expert": (
        {f"{EXPERT}.weight": ("F8_E4M3", (128, 128)), f"{EXPERT}.scale": ("F8_E8M0", (1, 1))},
        ("routed experts of layers.1 mix layouts", "all as MXFP4", "1 weights as FP8"),
    ),
    "weight of a scale missing": ({f"{LINEAR}.weight": ("", ())}, (f"layers.0 is missing: {LINEAR}.weight",)),
    "FP8 of another kind": (
        {f"{LINEAR}.weight": ("F8_E5M2", WKV), f"{LINEAR}.scale": ("", ())},
        ("of another dtype", "F8_E5M2"),
    ),
    "8 bits where the layout has F32": ({"layers.0.attn.attn_sink": ("U8", (4,))}, ("of another dtype", "U8 [4]")),
    "unknown scale": ({"layers.0.attn.extra.scale": ("F8_E8M0", (1, 1))}, ("too many", "attn.extra.scale")),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_native_headers_are_one_named_problem(tmp_path: Path, case: str) -> None:
    changes, parts = BAD[case]
    headers = {name: tensor for name, tensor in {**headers_of(), **changes}.items() if tensor[0]}
    (problem,) = problems(tmp_path, headers)
    assert all(part in problem.text() for part in parts), problem.text()


def without_experts(block: str = "layers.") -> Headers:
    """Native headers in which the routed experts under `block` are BF16."""
    experts = {s.name: s for s in source_tensors(TINY.dims) if s.role == Role.ROUTED_EXPERT}
    experts = {name: spec for name, spec in experts.items() if name.startswith(block)}
    gone = {f"{spec.module}.scale" for spec in experts.values()}
    headers = {name: tensor for name, tensor in headers_of().items() if name not in gone}
    return headers | {name: ("BF16", spec.shape) for name, spec in experts.items()}


def test_native_linears_with_bf16_experts_are_refused(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, without_experts())
    assert "quantized as in the native release, but the routed experts are BF16" in problem.text()


def test_layer_of_bf16_experts_among_mxfp4_ones_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, without_experts("layers.0."))
    assert "routed experts of layers.0 mix layouts" in problem.text()
    assert "6 weights as BF16" in problem.text()


def test_scale_in_an_unreadable_shard_is_not_called_missing(tmp_path: Path) -> None:
    headers = headers_of()
    del headers[f"{EXPERT}.scale"]
    sparse(tmp_path, headers)
    where = {name: "lost.safetensors" if name == f"{EXPERT}.scale" else "model.safetensors" for name in headers_of()}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    checkpoint = scan_source(tmp_path)
    assert ["not there" in p.what for p in checkpoint.problems] == [True]
    assert compare_with_layout(checkpoint, TINY.dims) == []


def test_problems_stop_the_run_before_it_starts(tmp_path: Path) -> None:
    headers = headers_of()
    del headers[f"{EXPERT}.scale"]
    (tmp_path / "source").mkdir()
    sparse(tmp_path / "source", headers)
    with pytest.raises(SourceError, match="scale tensor of a packed MXFP4 weight is missing"):
        run(job(tmp_path / "source", tmp_path / "out", "toy"))
    assert not (tmp_path / "out").exists()


def test_weight_and_scale_may_lie_in_different_shards(twins: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = {n: t for file in sorted(twins[0].glob("*.safetensors")) for n, t in load_file(file).items()}
    shutil.copyfile(twins[0] / "config.json", tmp_path / "config.json")
    for number, scales in enumerate((False, True), 1):
        part = {name: t for name, t in tensors.items() if name.endswith(".scale") == scales}
        save_file(part, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    files = {name: f"model-0000{1 + name.endswith('.scale')}-of-00002.safetensors" for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with open_source(tmp_path) as split, open_source(twins[0]) as whole:
        assert all(split.read(name) == whole.read(name) for name in whole.tensors)


def test_fingerprint_is_that_of_the_files(twins: tuple[Path, Path]) -> None:
    assert open_source(twins[0]).fingerprint() == scan(twins[0]).fingerprint()


def test_bf16_checkpoint_is_its_own_source(twins: tuple[Path, Path]) -> None:
    checkpoint = scan(twins[1])
    assert as_source(checkpoint) is checkpoint


def test_artifact_is_not_taken_for_a_native_source(release: tuple[Path, Path, dict[str, Any]]) -> None:
    checkpoint = scan_source(release[1])
    assert not isinstance(checkpoint, NativeCheckpoint)
    assert "compressed-tensors format" in compare_with_layout(checkpoint, TINY.dims)[0].text()


# ------------------------------------------------------------------------------------------------ plan, commands


def full_size(expert_dtype: str) -> Iterator[tuple[str, TensorEntry]]:
    dims = Dims.from_config(load_model_config(FLASH))
    for spec in source_tensors(dims):
        for part in stored_specs(spec, expert_dtype):
            yield part.name, TensorEntry(part.name, "model.safetensors", part.dtype, part.shape, 0, part.nbytes)


def test_plan_of_the_full_release_counts_what_lies_on_disk() -> None:
    file = FLASH
    entries = dict(full_size("fp4"))
    checkpoint = Checkpoint(file.parent, load_model_config(file), entries, {}, (), has_weights=True, config_file=file)
    plan = make_plan(as_source(checkpoint), load_config(CONFIGS / "nvfp4-fp8-mtp.yaml"))
    source, artifact = plan.as_dict()["source"], plan.as_dict()["artifact"]
    assert plan.problems == ()
    assert (source["layout"], source["tensors"], source["bytes"]) == ("native", 69_187, 159_609_485_896)
    assert source["forms"] == {"MXFP4": 33_792, "BF16": 433, "FP8": 375, "F32": 417, "I64": 3}
    assert source["classes"]["routed expert"]["tensors"] == 2 * 33_024
    assert (artifact["tensors"], artifact["mtp_tensors"]) == (134_309, 799)


def test_config_alone_is_assumed_to_describe_the_files_that_it_says(tmp_path: Path) -> None:
    config = load_model_config(FLASH)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    found = []
    for number, one in enumerate((config, plain)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(json.dumps(one))
        plan = make_plan(scan_source(tmp_path / str(number)), load_config(CONFIGS / "nvfp4-fp8-mtp.yaml"))
        source = plan.as_dict()["source"]
        assert source["model"] == {"tensors": 35_020, "bytes": 581_975_531_080}
        found.append((source["layout"], source["tensors"], source["bytes"]))
    assert found == [("assumed native", 69_187, 159_609_485_896), ("assumed bf16", 35_020, 581_975_531_080)]


def command(*arguments: str) -> int:
    """Exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_command_writes_twins_that_plan_tells_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text("n_routed_experts: 2\ncompress_ratios: [0]\nnum_hash_layers: 0\n")
    for form, layout in (("--grid", "MB; BF16\n"), ("--native", "MB; DeepSeek's own layout")):
        assert command("toy", str(tmp_path / form), form, "--config", str(tmp_path / "tiny.yaml")) == 0
        assert command("plan", str(tmp_path / form), "--config", str(CONFIGS / "toy.yaml")) == 0
        assert layout in capsys.readouterr().out
    with open_source(tmp_path / "--grid") as grid, open_source(tmp_path / "--native") as native:
        assert all(grid.read(name) == native.read(name) for name in grid.tensors)


def test_grid_and_native_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("toy", str(tmp_path / "x"), "--grid", "--native") == 2
    assert "exclude each other" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_reading_headers_imports_no_torch() -> None:
    code = "import sys, dsv4q.checkpoint.native; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
