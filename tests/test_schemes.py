"""What a scheme stores, in closed form, against compressed-tensors itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
from compressed_tensors.utils import get_direct_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.observers import Observer
from pydantic import ValidationError
from safetensors.torch import _TYPES

from dsv4q.errors import RecipeError
from dsv4q.recipe import schemes
from dsv4q.recipe.schemes import OBSERVERS, QuantArgs, Scheme, as_library_scheme, probe, stored_tensors
from dsv4q.run import observers  # noqa: F401 - registers the exact ones

E4M3 = "torch.float8_e4m3fn"
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
NVFP4_INPUT = {**NVFP4, "dynamic": "local", "scale_dtype": E4M3, "observer": "static_minmax"}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8",
         "zp_dtype": "torch.uint8"}  # fmt: skip
FP8 = {"num_bits": 8, "type": "float"}
FP8_BLOCK = {**FP8, "strategy": "block", "block_structure": [128, 128]}
FP8_GROUPS = {**FP8, "strategy": "group", "group_size": 128, "dynamic": True}
FP8_TOKEN = {**FP8, "strategy": "token", "dynamic": True}
FP8_STATIC = {**FP8, "strategy": "tensor"}
INT8_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
INT4_GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
ASYMMETRIC = {**INT4_GROUP, "symmetric": False}

SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "nvfp4": ({**NVFP4, "scale_dtype": E4M3}, NVFP4_INPUT, "nvfp4-pack-quantized"),
    "nvfp4 weights alone": (NVFP4, None, "nvfp4-pack-quantized"),
    "nvfp4, fp8 inputs": (NVFP4, FP8_TOKEN, "nvfp4-pack-quantized"),
    "nvfp4, static inputs": (NVFP4, NVFP4, "nvfp4-pack-quantized"),
    "nvfp4, dynamic inputs": (NVFP4, {**NVFP4, "dynamic": True}, "nvfp4-pack-quantized"),
    "fp4 groups of 16": ({**NVFP4, "strategy": "group"}, None, "nvfp4-pack-quantized"),
    "fp8 block": (FP8_BLOCK, FP8_GROUPS, "float-quantized"),
    "fp8 small block": ({**FP8_BLOCK, "block_structure": [64, 32]}, FP8_GROUPS, "float-quantized"),
    "fp8 channel, no inputs": ({**FP8, "strategy": "channel"}, None, "naive-quantized"),
    "fp8 channel": ({**FP8, "strategy": "channel"}, FP8_TOKEN, "float-quantized"),
    "fp8 tensor": ({**FP8, "strategy": "tensor"}, FP8_TOKEN, "float-quantized"),
    "fp8 tensor, static inputs": ({**FP8, "strategy": "tensor"}, FP8_STATIC, "float-quantized"),
    "fp8 groups": ({**FP8, "strategy": "group", "group_size": 128}, FP8_GROUPS, "float-quantized"),
    "int4 groups": (INT4_GROUP, None, "pack-quantized"),
    "int4 asymmetric groups": (ASYMMETRIC, None, "pack-quantized"),
    "int4 asymmetric rows": ({"num_bits": 4, "strategy": "channel", "symmetric": False}, None, "pack-quantized"),
    "int4 asymmetric tensor": ({"num_bits": 4, "strategy": "tensor", "symmetric": False}, None, "pack-quantized"),
    "int4 tensor groups": ({**INT4_GROUP, "strategy": "tensor_group"}, None, "pack-quantized"),
    "int4 block": ({**FP8_BLOCK, "num_bits": 4, "type": "int"}, None, "pack-quantized"),
    "int4 rows by group_size": ({"num_bits": 4, "group_size": -1}, None, "pack-quantized"),
    "int4, fp8 inputs": (INT4_GROUP, FP8_TOKEN, "int-quantized"),
    "int3 groups": ({**INT4_GROUP, "num_bits": 3}, None, "pack-quantized"),
    "int8 groups": ({**INT4_GROUP, "num_bits": 8}, None, "pack-quantized"),
    "int8 channel": ({"num_bits": 8, "strategy": "channel"}, None, "pack-quantized"),
    "int8 w8a8": ({"num_bits": 8, "strategy": "channel"}, INT8_TOKEN, "int-quantized"),
    "int8 w8a8 asymmetric": ({"num_bits": 8, "strategy": "channel", "symmetric": False}, INT8_TOKEN, "int-quantized"),
    "mxfp4": (MXFP4, {**MXFP4, "dynamic": True}, "mxfp4-pack-quantized"),
    "mxfp4 weights alone": (MXFP4, None, "mxfp4-pack-quantized"),
    "mxfp8": ({**MXFP4, "num_bits": 8}, {**MXFP4, "num_bits": 8, "dynamic": True}, "mxfp8-quantized"),
}
SHAPES = [(256, 512), (200, 384), (96, 128)]
"""The second and third have rows that no block of 128 divides."""


def scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None, form: str | None = None) -> Scheme:
    return Scheme.model_validate(
        {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    )


def named(name: str) -> Scheme:
    return scheme(*SCHEMES[name][:2])


def really_stored(wanted: Scheme, shape: tuple[int, int]) -> set[tuple[str, str, tuple[int, ...]]]:
    """Compress a real linear with compressed-tensors; suffix, safetensors dtype and shape of what it stores."""
    names = {dtype: name for name, dtype in _TYPES.items()}
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    initialize_module_for_quantization(linear, as_library_scheme(wanted))
    for name, parameter in linear.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(1.0)
    compressor = BaseCompressor.get_value_from_registry(wanted.compression_format)
    state = compressor.compress(get_direct_state_dict(linear), linear.quantization_scheme)
    return {(k, names[v.dtype], tuple(v.shape)) for k, v in state.items() if v is not None}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_stores_what_compressed_tensors_makes_of_a_real_linear(name: str, shape: tuple[int, int]) -> None:
    stored = stored_tensors(named(name), shape)
    assert set(stored) == really_stored(named(name), shape)
    assert len(set(stored)) == len(stored)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_closed_forms_equal_the_probe_on_the_meta_device(name: str, shape: tuple[int, int]) -> None:
    assert set(stored_tensors(named(name), shape)) == set(probe(named(name), shape))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_format_is_the_one_that_compressed_tensors_infers(name: str) -> None:
    args = named(name).model_dump(mode="json", exclude_unset=True, exclude={"format"})
    inferred = infer_module_format(torch.nn.Linear, QuantizationScheme.model_validate(args))
    assert named(name).compression_format == inferred.value == SCHEMES[name][2]


@pytest.mark.parametrize("name", ["nvfp4", "fp8 block", "int4 groups"])
def test_the_weight_comes_first(name: str) -> None:
    assert stored_tensors(named(name), (256, 512))[0][0] in ("weight", "weight_packed")


@pytest.mark.parametrize("name", ["nvfp4", "fp8 block", "int4 groups", "int8 channel"])
def test_the_common_schemes_need_no_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "probe", lambda *_: pytest.fail("asked compressed-tensors"))
    assert stored_tensors(named(name), (256, 512))


def test_the_experts_and_the_attention_of_the_contract() -> None:
    expert, attention = stored_tensors(named("nvfp4"), (2048, 4096)), stored_tensors(named("fp8 block"), (576, 4096))
    assert expert == (
        ("weight_packed", "U8", (2048, 2048)),
        ("weight_scale", "F8_E4M3", (2048, 256)),
        ("weight_global_scale", "F32", (1,)),
        ("input_global_scale", "F32", (1,)),
    )
    assert attention == (("weight", "F8_E4M3", (576, 4096)), ("weight_scale", "BF16", (5, 32)))


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("nvfp4", (64, 24), 16),
        ("int4 groups", (64, 192), 128),
        ("int4 groups", (64, 64), 128),
        ("fp8 block", (128, 200), 128),
        ("fp8 groups", (128, 200), 128),
        ("mxfp4", (64, 48), 32),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(name: str, shape: tuple[int, int], width: int) -> None:
    with pytest.raises(RecipeError) as caught:
        stored_tensors(named(name), shape)
    assert f"multiple of {width}" in str(caught.value) and str(list(shape)) in str(caught.value)


def test_a_scheme_that_compressed_tensors_cannot_store_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot store"):
        stored_tensors(scheme({"num_bits": 12, "strategy": "channel"}), (64, 64))


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"num_bits": 4, "strategy": "group"}, "group_size above zero"),
        ({"num_bits": 4, "strategy": "group", "group_size": -1}, "group_size above zero"),
        ({"num_bits": 4, "strategy": "channel", "group_size": 128}, "disagree"),
        ({**FP8, "strategy": "block"}, "block_structure"),
        ({**FP8, "strategy": "tensor", "block_structure": [128, 128]}, "block_structure"),
        ({**FP8, "strategy": "block", "block_structure": [0, 128]}, "greater than 0"),
        (FP8_BLOCK, "need input_activations"),
        ({**FP8, "strategy": "token"}, "dynamic: true"),
        ({**FP8, "dynamic": True}, "weights cannot be dynamic"),
        ({**FP8, "num_bits": 6}, "4 or 8 bits"),
        ({**INT4_GROUP, "actorder": "group"}, "actorder"),
        ({**INT4_GROUP, "actorder": True}, "actorder"),
        ({**INT4_GROUP, "observer": "minmux"}, "no such observer"),
        ({**INT4_GROUP, "scale_dtype": "torch.float7"}, "no such torch dtype"),
        ({**INT4_GROUP, "observer": "exact_nvfp4"}, "exact_nvfp4 is for"),
        ({**INT4_GROUP, "observer": "exact_fp8_block"}, "exact_fp8_block is for"),
        ({**INT4_GROUP, "num_bit": 4}, "num_bit"),
    ],
)
def test_weight_arguments_that_make_no_sense_are_refused(weights: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        scheme(weights)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({**FP8, "strategy": "channel"}, "strategy channel"),
        ({**FP8, "strategy": "block", "block_structure": [128, 128]}, "strategy block"),
        ({**FP8_GROUPS, "dynamic": "local"}, "tensor_group"),
        ({**FP8_TOKEN, "actorder": "weight"}, "actorder is for weights"),
        ({**NVFP4_INPUT, "observer": "exact_nvfp4"}, "is for weights"),
    ],
)
def test_input_arguments_that_make_no_sense_are_refused(inputs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        scheme(FP8_BLOCK, inputs)


def test_observers_that_a_recipe_may_name_are_registered_with_llmcompressor() -> None:
    assert {name.replace("_", "-") for name in OBSERVERS} <= set(Observer.registered_names())


@pytest.mark.parametrize("written", ["static-minmax", "Static_MinMax"])
def test_observer_names_are_as_loose_as_in_llmcompressor(written: str) -> None:
    assert QuantArgs.model_validate({"observer": written}).observer == "static_minmax"


def test_our_arguments_have_the_fields_of_compressed_tensors() -> None:
    assert set(QuantArgs.model_fields) == set(QuantizationArgs.model_fields)
    assert set(Scheme.model_fields) == set(QuantizationScheme.model_fields)


def maybe(**choices: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in choices.items()})


ARGS = maybe(
    num_bits=[1, 4, 6, 8, 9, 16],
    type=["int", "float", "FLOAT"],
    symmetric=[True, False],
    strategy=[None, "tensor", "channel", "group", "block", "token", "tensor_group", "Group"],
    group_size=[None, -1, 0, 16, 32, 128],
    block_structure=[None, [128, 128], [0, 1], "64x64"],
    dynamic=[True, False, "local"],
    actorder=[None, False, True, "weight", "static", "group"],
    scale_dtype=[None, E4M3, "uint8"],
)


@settings(max_examples=400, deadline=None)
@given(weights=ARGS, inputs=st.none() | ARGS)
def test_what_we_accept_compressed_tensors_accepts_and_understands_alike(
    weights: dict[str, Any], inputs: dict[str, Any] | None
) -> None:
    raw = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    try:
        ours = Scheme.model_validate(raw)
    except ValidationError:
        return
    plain = ours.model_dump(mode="json", exclude_unset=True)
    assert QuantizationScheme.model_validate(plain) == QuantizationScheme.model_validate(raw)
