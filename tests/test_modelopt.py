"""verify-shards on ModelOpt's layout: what is right passes, and every planted defect is found by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from artifact_maker import edit, edit_config, edit_json
from dsv4q.errors import SourceError
from dsv4q.made_up.native import grid_form
from dsv4q.made_up.toy import write_toy
from dsv4q.verify.judge import VerifyResult, verify, verify_headers
from export_toys import EXPERT, TINY, Tensors, native_toy, quantized, tensors, to_modelopt

Change = dict[str, torch.Tensor | None]
W1, W3 = (f"layers.1.ffn.experts.0.{p}" for p in ("w1", "w3"))
ATTENTION, SHARED = "layers.1.attn.wo_b", "layers.0.ffn.shared_experts.w2"
DRAFTED = "mtp.0.ffn.experts.1.w3"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_toy(tmp_path_factory.mktemp("source") / "native")


@pytest.fixture(scope="module")
def right(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modelopt")
    return to_modelopt(quantized(native, root / "artifact"), native, root / "out")


@pytest.fixture
def folder(right: Path, tmp_path: Path) -> Path:
    shutil.copytree(right, tmp_path / "artifact", copy_function=shutil.copyfile)
    return tmp_path / "artifact"


def deep(folder: Path, source: Path | None = None) -> VerifyResult:
    return verify(folder, source=source, deep=True, progress=None)


def found(result: VerifyResult) -> set[tuple[str, str | None]]:
    assert result.kind == "modelopt"
    return {(difference.check, difference.tensor) for difference in result.differences}


def flipped(tensor: torch.Tensor, at: int = 5, bit: int = 1) -> torch.Tensor:
    changed = tensor.clone()
    changed.reshape(-1).view(torch.uint8)[at] ^= bit
    return changed


# ------------------------------------------------------------------------------------------------ what is right


@pytest.mark.parametrize("with_source", [False, True])
def test_an_export_is_as_it_must_be(right: Path, native: Path, with_source: bool) -> None:
    result = deep(right, native if with_source else None)
    assert result.ok, [difference.text() for difference in result.differences]
    assert result.kind == "modelopt" and result.tensors == len(tensors(right))
    assert result.checks["pairs"] == 2 * TINY.n_routed_experts * len(TINY.compress_ratios)
    if with_source:
        experts = 3 * TINY.n_routed_experts * len(TINY.compress_ratios)
        assert result.errors["routed expert"]["exact"] == experts
        assert result.checks["bytes"] == result.tensors - 4 * experts


def test_an_export_of_a_minimum_and_maximum_artifact_is_as_it_must_be(native: Path, tmp_path: Path) -> None:
    artifact = quantized(native, tmp_path / "artifact", "nvfp4-fp8-mtp-minmax")
    result = deep(to_modelopt(artifact, native, tmp_path / "out"), native)
    assert result.ok, [difference.text() for difference in result.differences]
    assert result.errors["routed expert"]["exact"] < result.errors["routed expert"]["tensors"]


def test_scalars_may_be_vectors_of_one(folder: Path, native: Path) -> None:
    edit(folder, {n: t.reshape(1) for n, t in tensors(folder).items() if n.endswith(("weight_scale_2", "input_scale"))})
    assert deep(folder, native).ok


def with_nvfp4_draft(folder: Path) -> None:
    """Give the draft's experts the form, and the values, of a main layer's."""
    change: Change = {}
    for name, tensor in tensors(folder).items():
        if name.startswith("layers.0.ffn.experts."):
            change[name.replace("layers.0", "mtp.0")] = tensor.clone()
        elif name.startswith("mtp.0.ffn.experts.") and name.endswith(".scale"):
            change[name] = None
    edit(folder, change)


def test_a_draft_with_nvfp4_experts_needs_an_ignore_without_it(folder: Path) -> None:
    with_nvfp4_draft(folder)
    assert found(deep(folder)) == {("targets", None)}
    change_ignore(folder, lambda ignore: ignore.remove("mtp.*"))
    assert deep(folder).ok


# ------------------------------------------------------------------------------------------------ headers


def without(suffix: str) -> Callable[[Tensors], Change]:
    return lambda there: {f"{EXPERT}.{suffix}": None}


HEADERS: dict[str, tuple[Callable[[Tensors], Change], str]] = {
    "no codes of an expert": (without("weight"), f"{EXPERT}.weight"),
    "no block scales of an expert": (without("weight_scale"), f"{EXPERT}.weight_scale"),
    "no multiplier of an expert": (without("weight_scale_2"), f"{EXPERT}.weight_scale_2"),
    "no input scale of an expert": (without("input_scale"), f"{EXPERT}.input_scale"),
    "the native scale left beside an expert": (
        lambda there: {f"{EXPERT}.scale": torch.ones(128, 4).to(torch.float8_e8m0fnu)}, f"{EXPERT}.scale",
    ),
    "a multiplier under the name of the divisor": (
        lambda there: {f"{EXPERT}.weight_scale_2": None, f"{EXPERT}.weight_global_scale": torch.ones(1)},
        f"{EXPERT}.weight_global_scale",
    ),
    "codes under both names": (
        lambda there: {f"{EXPERT}.weight_packed": there[f"{EXPERT}.weight"]}, f"{EXPERT}.weight_packed",
    ),
    "codes as I8": (lambda there: {f"{EXPERT}.weight": there[f"{EXPERT}.weight"].view(torch.int8)}, f"{EXPERT}.weight"),
    "block scales as U8": (
        lambda there: {f"{EXPERT}.weight_scale": there[f"{EXPERT}.weight_scale"].view(torch.uint8)},
        f"{EXPERT}.weight_scale",
    ),
    "a multiplier as BF16": (
        lambda there: {f"{EXPERT}.weight_scale_2": there[f"{EXPERT}.weight_scale_2"].bfloat16()},
        f"{EXPERT}.weight_scale_2",
    ),
    "two multipliers": (lambda there: {f"{EXPERT}.weight_scale_2": torch.ones(2)}, f"{EXPERT}.weight_scale_2"),
    "an attention scale as F32": (
        lambda there: {f"{ATTENTION}.scale": there[f"{ATTENTION}.scale"].float()}, f"{ATTENTION}.scale",
    ),
    "an attention scale under another name": (
        lambda there: {f"{ATTENTION}.weight_scale": there[f"{ATTENTION}.scale"].float()}, f"{ATTENTION}.weight_scale",
    ),
    "a shared expert as BF16": (
        lambda there: {f"{SHARED}.weight": there[f"{SHARED}.weight"].bfloat16()}, f"{SHARED}.weight",
    ),
    "a shared expert without its scale": (lambda there: {f"{SHARED}.scale": None}, f"{SHARED}.scale"),
    "an expert of the draft without its scale": (lambda there: {f"{DRAFTED}.scale": None}, f"{DRAFTED}.scale"),
    "an expert of the draft missing": (lambda there: {f"{DRAFTED}.weight": None}, f"{DRAFTED}.weight"),
    "a copy of the shared head": (lambda there: {"mtp.0.head.weight": there["head.weight"]}, "mtp.0.head.weight"),
    "a tensor that nobody knows": (lambda there: {"layers.0.attn.wq_a.bias": torch.ones(4)}, "layers.0.attn.wq_a.bias"),
}  # fmt: skip


@pytest.mark.parametrize("defect", HEADERS)
def test_a_defect_of_the_headers_is_named(folder: Path, defect: str) -> None:
    change, name = HEADERS[defect]
    edit(folder, change(tensors(folder)))
    check = "mtp" if name.startswith("mtp.") else "tensors"
    assert (check, name) in found(verify_headers(folder))


def test_the_scale_that_overwrites_in_silence_is_said_to_do_so(folder: Path) -> None:
    edit(folder, HEADERS["the native scale left beside an expert"][0](tensors(folder)))
    (difference,) = verify_headers(folder).differences
    assert "in silence" in difference.expected


# ------------------------------------------------------------------------------------------------ config.json


def change_ignore(folder: Path, change: Callable[[list[str]], Any]) -> None:
    edit_config(folder, lambda quantization: change(quantization["ignore"]))
    edit_json(folder, "hf_quant_config.json", lambda beside: change(beside["quantization"]["exclude_modules"]))


def changed(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda quantization: quantization.update({key: value}))


def lost(key: str) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda quantization: quantization.pop(key))


CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an ignore list that forgets the draft": (lambda f: change_ignore(f, lambda i: i.remove("mtp.*")), "targets"),
    "an ignore list with a pattern": (
        lambda f: change_ignore(f, lambda i: i.__setitem__(i.index("mtp.*"), r"re:mtp\..*")), "targets",
    ),
    "an ignore list of another block": (
        lambda f: change_ignore(f, lambda i: i.__setitem__(i.index("mtp.*"), "mtp.1.*")), "targets",
    ),
    "an ignore list that covers main experts": (lambda f: change_ignore(f, lambda i: i.append("*.ffn.*")), "targets"),
    "an ignore list that covers one layer": (
        lambda f: change_ignore(f, lambda i: i.append("layers.1.ffn.experts")), "targets",
    ),
    "no ignore list": (lost("ignore"), "config"),
    "no moe_quant_algo": (lost("moe_quant_algo"), "config"),
    "no quant_algo": (lost("quant_algo"), "config"),
    "groups of 32": (changed("group_size", 32), "config"),
    "groups of 16.0": (changed("group_size", 16.0), "config"),
    "quant_method modelopt": (changed("quant_method", "modelopt"), "config"),
    "a quantized cache": (changed("kv_cache_quant_algo", "FP8"), "config"),
    "other FP8 blocks": (changed("weight_block_size", [1, 128]), "config"),
    "no scale_fmt": (lost("scale_fmt"), "config"),
    "linears that are not FP8": (changed("ignored_layers", ["model.layers.0.attn.wo_b"]), "config"),
    "a layer missing": (
        lambda f: edit_config(f, lambda q: q["quantized_layers"].pop("layers.1.ffn.experts")), "config",
    ),
    "a layer too many": (
        lambda f: edit_config(f, lambda q: q["quantized_layers"].update({"layers.9.ffn.experts": {}})), "config",
    ),
    "another expert_dtype": (lambda f: edit_json(f, "config.json", lambda c: c.update(expert_dtype="fp8")), "config"),
    "no quantization_config": (
        lambda f: edit_json(f, "config.json", lambda c: c.pop("quantization_config")), "config",
    ),
    "no hf_quant_config.json": (lambda f: (f / "hf_quant_config.json").unlink(), "config"),
    "a torn hf_quant_config.json": (lambda f: (f / "hf_quant_config.json").write_text("{"), "config"),
    "another hf_quant_config.json": (
        lambda f: edit_json(f, "hf_quant_config.json", lambda b: b["quantization"].update(group_size=32)), "config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", CONFIGS)
def test_a_defect_of_config_json_is_named(folder: Path, defect: str) -> None:
    change, check = CONFIGS[defect]
    change(folder)
    assert check in {one for one, _ in found(verify_headers(folder))}


# ------------------------------------------------------------------------------------------------ values


def scalars(value: float, suffix: str = "weight_scale_2") -> Callable[[Tensors], Change]:
    return lambda there: {f"{EXPERT}.{suffix}": torch.tensor(value)}


VALUES: dict[str, tuple[Callable[[Tensors], Change], tuple[str, str]]] = {
    "w3 one bit from w1": (
        lambda there: {f"{W3}.weight_scale_2": flipped(there[f"{W3}.weight_scale_2"], 0)},
        ("pairs", f"{W3}.weight_scale_2"),
    ),
    "w3 with another input scale": (
        lambda there: {f"{W3}.input_scale": there[f"{W3}.input_scale"] * 1.5}, ("pairs", f"{W3}.input_scale"),
    ),
    "a multiplier of 0": (scalars(0.0), ("scales", f"{EXPERT}.weight_scale_2")),
    "a multiplier that is NaN": (scalars(float("nan")), ("scales", f"{EXPERT}.weight_scale_2")),
    "a negative input scale": (scalars(-0.01, "input_scale"), ("scales", f"{EXPERT}.input_scale")),
    "an infinite input scale": (scalars(float("inf"), "input_scale"), ("scales", f"{EXPERT}.input_scale")),
    "an input scale that is the divisor": (
        lambda there: {f"{W1}.input_scale": 1 / there[f"{W1}.input_scale"]}, ("inputs", f"{W1}.input_scale"),
    ),
    "a block scale that is NaN": (
        lambda there: {f"{EXPERT}.weight_scale": set_bytes(there[f"{EXPERT}.weight_scale"], 0x7F)},
        ("scales", f"{EXPERT}.weight_scale"),
    ),
    "an attention weight that is NaN": (
        lambda there: {f"{ATTENTION}.weight": set_bytes(there[f"{ATTENTION}.weight"], 0xFF)},
        ("values", f"{ATTENTION}.weight"),
    ),
    "an attention scale that is NaN": (
        lambda there: {f"{ATTENTION}.scale": set_bytes(there[f"{ATTENTION}.scale"], 0xFF)},
        ("values", f"{ATTENTION}.scale"),
    ),
}  # fmt: skip


def set_bytes(tensor: torch.Tensor, value: int) -> torch.Tensor:
    """The first byte becomes `value`."""
    changed = tensor.clone()
    changed.reshape(-1).view(torch.uint8)[0] = value
    return changed


@pytest.mark.parametrize("defect", VALUES)
def test_a_defect_of_the_values_is_named_without_a_source(folder: Path, defect: str) -> None:
    change, wanted = VALUES[defect]
    edit(folder, change(tensors(folder)))
    assert wanted in found(deep(folder))


def both(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Change]:
    """The same change in w1 and w3."""
    return lambda there: {f"{m}.{suffix}": change(there[f"{m}.{suffix}"]) for m in (W1, W3)}


AGAINST: dict[str, tuple[Callable[[Tensors], Change], tuple[str, str]]] = {
    "a code of an expert": (
        lambda there: {f"{EXPERT}.weight": flipped(there[f"{EXPERT}.weight"], bit=4)}, ("encoding", f"{EXPERT}.weight"),
    ),
    "block scales twice as large": (
        lambda there: {f"{EXPERT}.weight_scale": (there[f"{EXPERT}.weight_scale"].float() * 2).to(torch.float8_e4m3fn)},
        ("encoding", f"{EXPERT}.weight"),
    ),
    "multipliers of a pair twice as large": (both("weight_scale_2", lambda t: t * 2), ("encoding", f"{W1}.weight")),
    "a multiplier that is the divisor": (
        lambda there: {f"{EXPERT}.weight_scale_2": 1 / there[f"{EXPERT}.weight_scale_2"]},
        ("encoding", f"{EXPERT}.weight"),
    ),
    "another expert's weights": (
        lambda there: {
            f"{EXPERT}.{suffix}": there[f"layers.0.ffn.experts.0.w2.{suffix}"]
            for suffix in ("weight", "weight_scale", "weight_scale_2")
        },
        ("encoding", f"{EXPERT}.weight"),
    ),
    "a byte of attention": (
        lambda there: {f"{ATTENTION}.weight": flipped(there[f"{ATTENTION}.weight"])}, ("bytes", f"{ATTENTION}.weight"),
    ),
    "a scale of attention": (
        lambda there: {f"{ATTENTION}.scale": flipped(there[f"{ATTENTION}.scale"], 0)}, ("bytes", f"{ATTENTION}.scale"),
    ),
    "a byte of a shared expert": (
        lambda there: {f"{SHARED}.weight": flipped(there[f"{SHARED}.weight"])}, ("bytes", f"{SHARED}.weight"),
    ),
    "a code of the draft": (
        lambda there: {f"{DRAFTED}.weight": flipped(there[f"{DRAFTED}.weight"])}, ("bytes", f"{DRAFTED}.weight"),
    ),
    "a norm": (lambda there: {"norm.weight": flipped(there["norm.weight"])}, ("bytes", "norm.weight")),
}  # fmt: skip


@pytest.mark.parametrize("defect", AGAINST)
def test_a_defect_is_named_against_the_source(folder: Path, native: Path, defect: str) -> None:
    change, wanted = AGAINST[defect]
    edit(folder, change(tensors(folder)))
    assert wanted in found(verify(folder, source=native, deep=False, progress=None))


def test_one_changed_byte_is_one_difference(folder: Path, native: Path) -> None:
    edit(folder, {"embed.weight": flipped(tensors(folder)["embed.weight"])})
    assert found(deep(folder, native)) == {("bytes", "embed.weight")}


def test_a_key_of_the_source_that_is_lost_is_named(folder: Path, native: Path) -> None:
    edit_json(folder, "config.json", lambda config: config.pop("rms_norm_eps"))
    assert ("source", None) in found(verify(folder, source=native, deep=False, progress=None))


def test_a_bf16_source_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    source = write_toy(tmp_path / "bf16", TINY, form=grid_form()).out
    with pytest.raises(SourceError, match="native release"):
        verify(folder, source=source, deep=False, progress=None)


def test_differences_speak_of_the_names_in_the_files(folder: Path, native: Path) -> None:
    edit(folder, {f"{EXPERT}.weight": flipped(tensors(folder)[f"{EXPERT}.weight"], bit=4)})
    names = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    assert {difference.tensor for difference in deep(folder, native).differences} <= names
