"""NVIDIA ModelOpt's layout of a DeepSeek-V4: which tensors, which config.json; what SGLang and TensorRT-LLM read.

The routed experts of the main layers are NVFP4 under ModelOpt's names; everything else, the draft too, is as in the
native release. Of an expert's linear [o, i]:

| compressed-tensors              | ModelOpt                     | relation                          |
|---------------------------------|------------------------------|-----------------------------------|
| `weight_packed` U8 [o, i/2]     | `weight` U8 [o, i/2]         | the same bytes                    |
| `weight_scale` F8_E4M3 [o, i/16]| `weight_scale`               | the same bytes                    |
| `weight_global_scale` F32 [1]   | `weight_scale_2` F32 []      | 1/x in F32: a divisor, a multiplier |
| `input_global_scale` F32 [1]    | `input_scale` F32 []         | 1/x in F32                        |

The native `.scale` of such a linear must be gone: vLLM would load it over `weight_scale` in silence.
Sources: ModelOpt `examples/deepseek/deepseek_v4/quantize_to_nvfp4.py` and `torch/export/convert_hf_config.py`; vLLM
0.33.0 `model_executor/layers/quantization/modelopt.py` and its DeepSeek-V4 loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4q import __version__
from dsv4q.checkpoint.native import release_tensors
from dsv4q.errors import SourceError
from dsv4q.layout import Dims, Shape, TensorSpec, source_tensors

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
"""The layouts of an artifact."""

EXPERT_DTYPE = "fp4"
"""`expert_dtype` of the releases that have this layout: vLLM builds the experts by it."""

NATIVE_KEYS: Mapping[str, Any] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
"""quantization_config of a native release, which stays true of all but the experts."""

IGNORE = ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*")
"""Globs (`fnmatch`). vLLM needs `mtp.*`: without it the draft's MXFP4 experts are built as NVFP4, in silence."""

_ALGORITHM = {"quant_algo": "NVFP4", "group_size": 16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the layout."""

    name: str
    dtype: str
    shape: Shape
    spec: TensorSpec
    """The tensor of the model that it belongs to."""
    twin: str = ""
    """Of a routed expert of a main layer, the name in compressed-tensors' layout; else empty."""
    inverse: bool = False
    """Its twin is its reciprocal, of shape [1]."""


def is_main_expert(spec: TensorSpec) -> bool:
    """Whether a weight is NVFP4 in this layout."""
    return spec.expert is not None and not spec.is_mtp


def modelopt_tensors(dims: Dims) -> Iterator[StoredTensor]:
    """Every tensor of the layout, in the model's order."""
    for spec in source_tensors(dims):
        if is_main_expert(spec):
            yield from expert_tensors(spec)
        else:
            yield from native_tensors(spec)


def expert_tensors(spec: TensorSpec) -> Iterator[StoredTensor]:
    """The four tensors of a main routed expert's weight [o, i]."""
    rows, columns = spec.shape
    scalar: Shape = ()
    for suffix, dtype, shape, twin in (
        ("weight", "U8", (rows, columns // 2), "weight_packed"),
        ("weight_scale", "F8_E4M3", (rows, columns // 16), "weight_scale"),
        ("weight_scale_2", "F32", scalar, "weight_global_scale"),
        ("input_scale", "F32", scalar, "input_global_scale"),
    ):
        name = f"{spec.module}.{suffix}"
        yield StoredTensor(name, dtype, shape, spec, f"{spec.module}.{twin}", inverse=dtype == "F32")


def native_tensors(spec: TensorSpec) -> Iterator[StoredTensor]:
    """What a release with MXFP4 experts has for a tensor of the model: itself, or weight and scale."""
    for name, dtype, shape in release_tensors(spec, EXPERT_DTYPE):
        yield StoredTensor(name, dtype, shape, spec)


def layout_of(config: Mapping[str, Any]) -> str | None:
    """The layout that an artifact's config.json states; None for a checkpoint that is no artifact."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    if quantization.get("quant_method") == COMPRESSED:
        return COMPRESSED
    marks = ("quant_algo", "moe_quant_algo")
    return MODELOPT if any(mark in quantization for mark in marks) else None


# ------------------------------------------------------------------------------------------------ config.json


def modelopt_config(source: Mapping[str, Any], dims: Dims, where: str) -> dict[str, Any]:
    """config.json: the source's, with what vLLM and SGLang need in quantization_config.

    Args:
        source: config.json of the native release.
        where: names it in errors.

    Raises:
        SourceError: it is not that of a release with MXFP4 experts and FP8 in blocks of 128x128.
    """
    wanted = {"expert_dtype": EXPERT_DTYPE, **{f"quantization_config.{key}": v for key, v in NATIVE_KEYS.items()}}
    stated = source.get("quantization_config")
    native = dict(stated) if isinstance(stated, dict) else {}
    found = {"expert_dtype": source.get("expert_dtype"), **{f"quantization_config.{k}": v for k, v in native.items()}}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise SourceError(
                "config.json of the source is not that of a native release, whose keys this layout keeps",
                where=f"{where}: {key}",
                expected=repr(value),
                found=repr(found[key]) if found.get(key) is not None else "no such key",
                hint="give the release as DeepSeek published it, config.json too",
            )
    return {**source, "quantization_config": {**native, **_keys(dims), "producer": _producer()}}


def hf_quant_config(dims: Dims) -> dict[str, Any]:
    """hf_quant_config.json, as ModelOpt writes it beside config.json."""
    keys = _keys(dims)
    names = ("quant_algo", "kv_cache_quant_algo", "group_size", "quantized_layers")
    return {
        "producer": _producer(),
        "quantization": {**{name: keys[name] for name in names}, "exclude_modules": keys["ignore"]},
    }


def _keys(dims: Dims) -> dict[str, Any]:
    """vLLM reads moe_quant_algo and ignore; SGLang quant_algo, moe_quant_algo and group_size."""
    return {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "ignore": list(IGNORE),
        "quantized_layers": {f"layers.{n}.ffn.experts": dict(_ALGORITHM) for n in range(dims.layers)},
    }


def _producer() -> dict[str, str]:
    return {"name": "dsv4q", "version": __version__}
