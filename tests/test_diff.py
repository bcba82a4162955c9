"""`dsv4q diff`: what it calls equal, missing, stored otherwise or different, in every layout that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import MXFP4
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor

import artifact_maker as maker
from dsv4q import diff as story
from dsv4q.console import Console, Mode
from dsv4q.diff import DiffRequest, diff
from dsv4q.errors import DeviceError, SourceError
from dsv4q.formats.encode import nvfp4_decode
from dsv4q.made_up.native import grid_form, native_form
from dsv4q.made_up.toy import write_toy
from runs import run, toy_job

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def compared(a: Path, b: Path) -> dict[str, Any]:
    return diff(DiffRequest(a, b, "cpu"), Console(Mode.QUIET))


def only_tensor(result: dict[str, Any]) -> dict[str, Any]:
    """The one tensor that is not the same bytes."""
    assert result["only_a"] == result["only_b"] == []
    assert len(result["tensors"]) == 1
    return result["tensors"][0]


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] = LLAMA) -> Path:
    """A checkpoint of one file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def linear(stored: dict[str, Tensor], module: str = "layers.0.proj") -> dict[str, Tensor]:
    return {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}


def against_values(tmp_path: Path, stored: dict[str, Tensor], values: Tensor, **config: Any) -> dict[str, Any]:
    """A linear, stored in some way, held against the F32 values that it must stand for."""
    a = write(tmp_path / "a", {"layers.0.proj.weight": values.to(torch.float32)})
    return only_tensor(compared(a, write(tmp_path / "b", linear(stored), {**LLAMA, **config})))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(torch.bfloat16)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`native`, `bf16` (the same values) and `out`, an exact artifact of the native one."""
    folder = tmp_path_factory.mktemp("diff")
    write_toy(folder / "source", form=native_form())
    write_toy(folder / "bf16", form=grid_form())
    run(toy_job(folder, make=False))
    return folder


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    return maker.random_source()


# ------------------------------------------------------------------------------------------------ whole checkpoints


def test_a_checkpoint_is_the_same_as_itself(toys: Path) -> None:
    result = compared(toys / "out", toys / "out")
    assert result["same"] and result["tensors"] == result["only_a"] == result["only_b"] == result["stored_as"] == []
    assert sum(found["equal_bytes"] for found in result["classes"].values()) == result["a"]["logical"] == 430


def test_an_exact_artifact_has_all_values_of_its_native_source(toys: Path) -> None:
    result = compared(toys / "source", toys / "out")
    assert not result["same"] and result["only_a"] == []
    assert {t["verdict"] for t in result["tensors"]} == {"equal_values"}
    assert result["classes"]["routed expert"]["equal_values"] == 120
    assert sum(t["signs_of_zero"] for t in result["tensors"]) == 0


def test_what_only_an_artifact_has_is_named(toys: Path) -> None:
    only = compared(toys / "source", toys / "out")["only_b"]
    assert [name for name in only if not name.endswith(".input_scale")] == [
        "mtp.0.emb.tok_emb.weight", "mtp.0.head.weight",
    ]  # fmt: skip
    assert len(only) == 2 + 120


def test_the_native_release_and_its_bf16_form_have_equal_values(toys: Path) -> None:
    result = compared(toys / "source", toys / "bf16")
    assert {t["verdict"] for t in result["tensors"]} == {"equal_values"}
    stored = {(one["class"], one["a"], one["b"]) for one in result["stored_as"]}
    assert ("routed expert", "MXFP4", "BF16") in stored and ("shared expert", "FP8 128x128", "BF16") in stored


def test_errors_of_a_min_max_artifact_are_those_of_its_decoded_values(
    source: dict[str, Tensor], tmp_path: Path
) -> None:
    a = maker.write_source(tmp_path / "a", source)
    b = maker.write_artifact(tmp_path / "b", source)
    found = {t["tensor"]: t for t in compared(a, b)["tensors"]}
    module = "layers.1.ffn.experts.2.w1"
    stored = maker.read(b)
    scales = (stored[f"{module}.weight_scale"], stored[f"{module}.weight_global_scale"])
    decoded = nvfp4_decode(stored[f"{module}.weight_packed"], *scales)
    weight = source[f"{module}.weight"].float()
    expected = float((decoded - weight).norm() / weight.norm())
    assert found[f"{module}.weight"]["relative_error"] == pytest.approx(expected, rel=1e-5)
    assert found[f"{module}.weight"]["unequal"] == int((decoded != weight).sum())
    assert found[f"{module}.weight"]["max_abs_error"] == pytest.approx(float((decoded - weight).abs().max()))


def test_the_worst_tensor_of_a_class_is_named(source: dict[str, Tensor], tmp_path: Path) -> None:
    a = maker.write_source(tmp_path / "a", source)
    b = maker.copy(a, tmp_path / "b")
    slightly, worse = "layers.0.attn_norm.weight", "layers.2.ffn_norm.weight"
    maker.edit(b, {slightly: source[slightly] * 1.01, worse: source[worse] * 2})
    norms = compared(a, b)["classes"]["norm"]
    assert (norms["different"], norms["worst_tensor"], norms["worst"]) == (2, worse, 1.0)
    assert 0 < norms["relative_error"] < 1


@pytest.mark.parametrize("experts", ["int4", "fp8"])
def test_other_schemes_of_compressed_tensors_are_decoded(
    experts: str, source: dict[str, Tensor], tmp_path: Path
) -> None:
    a = maker.write_source(tmp_path / "a", source)
    b = maker.write_artifact(tmp_path / "b", source, experts=experts)
    found = compared(a, b)["classes"]["routed expert"]
    assert found["different"] == found["both"] and found["not_decoded"] == 0
    assert 0.01 < found["relative_error"] < 0.15


def test_a_tensor_that_is_missing_is_named_on_its_side(source: dict[str, Tensor], tmp_path: Path) -> None:
    a = maker.write_source(tmp_path / "a", source)
    b = maker.copy(a, tmp_path / "b")
    maker.edit(b, {"norm.weight": None, "extra.weight": torch.ones(3)})
    result = compared(a, b)
    assert (result["only_a"], result["only_b"]) == (["norm.weight"], ["extra.weight"])
    assert result["classes"]["norm"]["only_a"] == result["classes"]["other"]["only_b"] == 1


def test_other_files_and_other_shards_do_not_count(source: dict[str, Tensor], tmp_path: Path) -> None:
    a = maker.write_source(tmp_path / "a", source)
    b = write(tmp_path / "b", dict(reversed(source.items())), maker.CONFIG)
    assert compared(a, b)["same"]


# ------------------------------------------------------------------------------------------------ bytes and values


def test_a_single_flipped_bit_is_found(tmp_path: Path) -> None:
    weight = gaussian(64, 96)
    other = weight.clone()
    other.view(torch.int16)[63, 95] ^= 1
    a, b = write(tmp_path / "a", {"w": weight}), write(tmp_path / "b", {"w": other})
    assert only_tensor(compared(a, b))["unequal"] == 1


def test_a_zero_of_another_sign_is_other_bytes_but_an_equal_value(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.tensor([0.0, 1.0])})
    found = only_tensor(compared(a, write(tmp_path / "b", {"w": torch.tensor([-0.0, 1.0])})))
    assert (found["verdict"], found["signs_of_zero"], found["unequal"]) == ("equal_values", 1, 0)


def test_nan_and_infinity_are_counted_and_spoil_no_sum(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.tensor([1.0, 2.0, float("nan"), 4.0])})
    b = write(tmp_path / "b", {"w": torch.tensor([float("inf"), 1.0, float("nan"), 4.0])})
    found = only_tensor(compared(a, b))
    assert (found["unequal"], found["not_finite"], found["max_abs_error"]) == (2, 1, 1.0)
    assert found["relative_error"] == pytest.approx((1 / 20) ** 0.5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_errors_of_very_small_and_very_large_values_are_right(size: float, tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.tensor([3.0, 4.0]) * size})
    found = only_tensor(compared(a, write(tmp_path / "b", {"w": torch.tensor([3.0, 4.5]) * size})))
    assert found["relative_error"] == pytest.approx(0.1, rel=1e-5)


def test_the_same_nan_bytes_are_the_same(tmp_path: Path) -> None:
    tensors = {"w": torch.full((5,), float("nan"))}
    assert compared(write(tmp_path / "a", tensors), write(tmp_path / "b", tensors))["same"]


def test_another_dtype_of_equal_values_is_told(tmp_path: Path) -> None:
    weight = gaussian(8, 8)
    a, b = write(tmp_path / "a", {"w": weight}), write(tmp_path / "b", {"w": weight.float()})
    result = compared(a, b)
    assert only_tensor(result)["verdict"] == "equal_values" and not result["same"]
    assert result["stored_as"] == [{"class": "other", "a": "BF16", "b": "F32", "tensors": 1}]


def test_large_integers_are_not_rounded_before_they_are_compared(tmp_path: Path) -> None:
    number = (1 << 60) + 1
    a, b = (write(tmp_path / side, {"t": torch.tensor([n])}) for side, n in (("a", number), ("b", number + 1)))
    assert only_tensor(compared(a, b))["unequal"] == 1


def test_another_shape_is_told_and_not_compared(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": torch.ones(2, 3)}), write(tmp_path / "b", {"w": torch.ones(3, 2)})
    found = only_tensor(compared(a, b))
    assert (found["verdict"], found["a"]["shape"], found["b"]["shape"]) == ("other_shape", [2, 3], [3, 2])


def test_tensors_larger_than_a_piece_are_compared_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "PIECE", 7)
    weight = torch.arange(100, dtype=torch.float32)
    other = weight.clone()
    other[[6, 50, 99]] += 1
    a, b = write(tmp_path / "a", {"w": weight}), write(tmp_path / "b", {"w": other.to(torch.bfloat16).float()})
    assert only_tensor(compared(a, b))["unequal"] == 3


def test_quantized_weights_are_decoded_alike_in_pieces_of_any_size(
    source: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = maker.write_source(tmp_path / "a", source)
    b = maker.write_artifact(tmp_path / "b", source, experts="fp8")
    whole = compared(a, b)["tensors"]
    monkeypatch.setattr(story, "ROWS_AT_ONCE", {"cpu": 1})
    for one, other in zip(whole, compared(a, b)["tensors"], strict=True):
        assert one["unequal"] == other["unequal"]
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-6)


# ------------------------------------------------------------------------------------------------ layouts


def modelopt_nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """ModelOpt's tensors of a linear, and the values that they stand for: q * weight_scale * weight_scale_2."""
    stored = maker.nvfp4(weight, weight, pow2=True)
    values = nvfp4_decode(stored["weight_packed"], stored["weight_scale"], stored["weight_global_scale"])
    second = stored["weight_global_scale"].reciprocal().reshape(())
    scales = {"weight_scale": stored["weight_scale"], "weight_scale_2": second, "input_scale": torch.tensor(0.25)}
    return {"weight": stored["weight_packed"], **scales}, values


def test_nvfp4_of_modelopt_and_of_compressed_tensors_are_equal_values(tmp_path: Path) -> None:
    weight = gaussian(32, 64)
    theirs, _ = modelopt_nvfp4(weight)
    ours = {**maker.nvfp4(weight, weight, pow2=True), "input_global_scale": torch.tensor([4.0])}
    result = compared(write(tmp_path / "a", linear(theirs)), write(tmp_path / "b", linear(ours)))
    assert {t["tensor"]: t["verdict"] for t in result["tensors"]} == {
        "layers.0.proj.weight": "equal_values", "layers.0.proj.input_scale": "equal_values",
    }  # fmt: skip
    assert {"class": "other", "a": "NVFP4 (ModelOpt)", "b": "NVFP4 (compressed-tensors)", "tensors": 1} in result[
        "stored_as"
    ]


def test_another_input_scale_is_told_as_a_multiplier(tmp_path: Path) -> None:
    stored = maker.nvfp4(gaussian(16, 32), gaussian(16, 32))
    a = write(tmp_path / "a", linear({**stored, "input_global_scale": torch.tensor([4.0])}))
    b = write(tmp_path / "b", linear({**stored, "input_global_scale": torch.tensor([5.0])}))
    found = only_tensor(compared(a, b))
    assert (found["class"], found["tensor"]) == ("input scale", "layers.0.proj.input_scale")
    assert found["relative_error"] == pytest.approx(0.2)


def test_a_modelopt_release_that_keeps_the_native_fp8_is_read(toys: Path, tmp_path: Path) -> None:
    native = maker.read(toys / "source")
    module = "layers.1.ffn.experts.0.w2"
    stored, _ = modelopt_nvfp4(maker.read(toys / "bf16")[f"{module}.weight"])
    mixed = {name: t for name, t in native.items() if not name.startswith(module)} | linear(stored, module)
    b = write(tmp_path / "b", mixed, json.loads((toys / "source" / "config.json").read_text()))
    result = compared(toys / "source", b)
    assert [t["tensor"] for t in result["tensors"]] == [f"{module}.weight"]
    assert result["tensors"][0]["b"]["stored_as"] == "NVFP4 (ModelOpt)"
    assert result["only_b"] == [f"{module}.input_scale"]


@pytest.mark.parametrize("shape", [(), (1,), (32,), (32, 1), (1, 1, 1, 1)])
def test_fp8_scales_of_every_shape_are_understood(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = gaussian(32, 64).mul(100).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    rows = scale.reshape(-1, 1).expand(32 if scale.numel() == 32 else 1, 1)
    found = against_values(tmp_path, {"weight": codes, "weight_scale": scale}, codes.float() * rows)
    assert found["verdict"] == "equal_values"


def test_fp8_blocks_of_an_odd_size_are_those_that_config_json_states(tmp_path: Path) -> None:
    codes = gaussian(80, 70).mul(100).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    wide = scale.repeat_interleave(64, 0)[:80].repeat_interleave(48, 1)[:, :70]
    stated = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 48]}}
    found = against_values(tmp_path, {"weight": codes, "weight_scale_inv": scale}, codes.float() * wide, **stated)
    assert (found["verdict"], found["b"]["stored_as"]) == ("equal_values", "FP8 64x48")


def test_fp8_per_row_of_compressed_tensors_decodes_as_it_does(tmp_path: Path) -> None:
    weight, args = gaussian(24, 40), QuantizationArgs(num_bits=8, type="float", strategy="channel")
    scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
    values = FloatQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert against_values(tmp_path, stored, values)["verdict"] == "equal_values"


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_of_compressed_tensors_decode_as_they_do(bits: int, symmetric: bool, tmp_path: Path) -> None:
    args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric)
    weight = gaussian(40, 96).float() + 0.01
    groups = weight.unflatten(-1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zero}
    stored = PackedQuantizationCompressor.compress(state, scheme)
    values = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    found = against_values(tmp_path, {k: v for k, v in stored.items() if v is not None}, values)
    assert found["verdict"] == "equal_values" and found["b"]["stored_as"].startswith(f"INT{bits} groups of 32")


def test_plain_integers_of_compressed_tensors_decode_as_they_do(tmp_path: Path) -> None:
    weight, args = gaussian(24, 40).float(), QuantizationArgs(num_bits=8, type="int", strategy="channel")
    scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = IntQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    values = IntQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert against_values(tmp_path, stored, values)["verdict"] == "equal_values"


def test_columns_in_the_order_of_g_idx_take_the_scale_of_their_group(tmp_path: Path) -> None:
    stored = maker.int4(gaussian(16, 64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // maker.INT_GROUP
    codes = torch.stack([stored["weight_packed"] >> 4 * i & 15 for i in range(8)], dim=-1).flatten(1) - 8
    values = codes.float() * stored["weight_scale"].float()[:, order]
    found = against_values(tmp_path, {**stored, "weight_g_idx": order.to(torch.int32)}, values)
    assert found["verdict"] == "equal_values"


def test_mxfp4_of_compressed_tensors_decodes_as_it_does(tmp_path: Path) -> None:
    weight = gaussian(16, 64)
    scale = torch.exp2(torch.ceil(torch.log2(weight.unflatten(-1, (-1, 32)).abs().amax(-1).float() / 6)))
    scheme = QuantizationScheme(targets=["Linear"], **MXFP4)
    stored = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    values = MXFP4PackedCompressor.decompress(stored, scheme)["weight"]
    assert against_values(tmp_path, stored, values)["verdict"] == "equal_values"


def test_a_layout_that_nobody_knows_is_marked_and_not_guessed(tmp_path: Path) -> None:
    codes, scale = torch.full((4, 8), 17, dtype=torch.uint8), torch.ones(4, 3)
    a, b = ({"weight": codes + n, "weight_scale": scale} for n in (0, 1))
    found = only_tensor(compared(write(tmp_path / "a", linear(a)), write(tmp_path / "b", linear(b))))
    assert found["verdict"] == "not_decoded"
    assert "no known layout has weight U8 with weight_scale F32" in found["b"]["reason"]


@pytest.mark.parametrize("module", ["layers.1.attn.wq_a", "layers.0.ffn.experts.1.w3"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_of_others_are_those_of_the_model(
    module: str, prefix: str, source: dict[str, Tensor], tmp_path: Path
) -> None:
    b = maker.write_artifact(tmp_path / "b", source, mtp=False)
    hf = {
        "layers.1.attn.wq_a": "layers.1.self_attn.q_a_proj",
        "layers.0.ffn.experts.1.w3": "layers.0.mlp.experts.1.up_proj",
    }
    theirs = hf[module] if prefix else module
    renamed = {n.replace(f"{module}.", f"model.{theirs}."): t for n, t in maker.read(b).items()}
    a = write(tmp_path / "a", renamed, json.loads((b / "config.json").read_text()))
    assert compared(a, b)["same"]


def test_two_names_for_one_tensor_stay_two_tensors(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"model.x": torch.ones(1), "x": torch.zeros(1)})
    b = write(tmp_path / "b", {"x": torch.zeros(1)})
    assert compared(a, b)["only_a"] == ["model.x"]


# ------------------------------------------------------------------------------------------------ refusals


def test_a_damaged_checkpoint_is_refused(source: dict[str, Tensor], tmp_path: Path) -> None:
    a = maker.write_source(tmp_path / "a", source)
    shard = sorted(a.glob("*.safetensors"))[0]
    b = maker.copy(a, tmp_path / "b")
    (b / shard.name).write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SourceError, match="truncated"):
        compared(a, b)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.ones(1)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="no safetensors files"):
        compared(a, tmp_path / "b")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.ones(1)})
    with pytest.raises(DeviceError):
        diff(DiffRequest(a, a, "cuda:99"), Console(Mode.QUIET))
