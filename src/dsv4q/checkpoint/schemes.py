"""Compressed-tensors schemes as data: what a scheme stores for one linear, and how config.json states it.

`weights` and `input_activations` hold the fields of compressed-tensors' `QuantizationArgs`; its own classes are
not imported here because that costs seconds and a plan must be instant. The common formats are written down in
closed form; any other scheme is put to compressed-tensors itself, on the meta device. A test compares the two.

Source of the formats: compressed-tensors 0.19 `compressors/{nvfp4,naive_quantized,pack_quantized}`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsv4q.checkpoint.layout import Shape
from dsv4q.errors import RecipeError

NVFP4 = "nvfp4-pack-quantized"
FLOAT = "float-quantized"
PACKED_INT = "pack-quantized"
MIXED = "mixed-precision"

StoredTensor = tuple[str, str, Shape]
"""Suffix behind the module's name, safetensors dtype, shape."""


class QuantArgs(BaseModel):
    """How one operand (weight or input) is quantized; the fields of compressed-tensors' `QuantizationArgs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: int = Field(8, ge=1, le=16)
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"] | None = None
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: str | bool | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agree(self) -> QuantArgs:
        grouped = self.strategy in ("group", "tensor_group")
        if grouped and not self.group_size:
            raise ValueError(f"strategy {self.strategy} needs a group_size")
        if self.strategy == "block" and self.block_structure is None:
            raise ValueError("strategy block needs a block_structure such as [128, 128]")
        if self.group_size and not grouped and self.strategy is not None:
            raise ValueError(f"group_size and strategy {self.strategy} disagree")
        if self.dynamic == "local" and self.strategy != "tensor_group":
            raise ValueError("dynamic: local needs strategy tensor_group")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether an input quantized this way has statistics that only calibration data can give."""
        return self.dynamic is not True


class Scheme(BaseModel):
    """One config group of the recipe: the modules it targets and how they are quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...]
    weights: QuantArgs
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    format: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Scheme:
        if not self.targets:
            raise ValueError("a config group needs at least one target")
        if self.output_activations is not None:
            raise ValueError("output_activations are not supported: the consumer has no place for them")
        if self.weights.dynamic:
            raise ValueError("weights cannot be dynamic: an artifact stores their scales")
        form = (self.weights.type, self.weights.num_bits, self.weights.strategy, self.weights.group_size)
        if self.weights.observer == "exact_nvfp4" and form != ("float", 4, "tensor_group", 16):
            raise ValueError(
                "observer exact_nvfp4 is for float weights of 4 bits, strategy tensor_group, group_size 16"
            )
        if self.weights.observer == "exact_fp8_block" and (form[:2], self.weights.block_structure) != (
            ("float", 8),
            (128, 128),
        ):
            raise ValueError("observer exact_fp8_block is for float weights of 8 bits, block_structure [128, 128]")
        return self

    @property
    def compression_format(self) -> str:
        """The stated format, or the one that compressed-tensors infers from the arguments."""
        return self.format or infer_format(self)


def infer_format(scheme: Scheme) -> str:
    """Compressed-tensors' format for these arguments (`compressors/format.py`, `infer_module_format`)."""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights.type == "float" and weights.num_bits == 4 and weights.group_size == 16:
        return NVFP4
    if weights.type == "float" and weights.num_bits == 8 and inputs is not None and weights.group_size != 32:
        return FLOAT
    if weights.type == "int" and inputs is None:
        return PACKED_INT
    return _infer_with_library(scheme)


def stored_tensors(scheme: Scheme, shape: Shape) -> tuple[StoredTensor, ...]:
    """What an artifact stores for a BF16 linear of `shape` [out, in] under `scheme`, the weight first.

    Raises:
        RecipeError: the shape does not fit the scheme (columns not a multiple of the group or block).
    """
    weights, form = scheme.weights, scheme.compression_format
    _check_fit(weights, shape)
    simple = weights.symmetric and weights.strategy in ("tensor", "channel", "group", "block", "tensor_group")
    if form == NVFP4 and simple and weights.strategy == "tensor_group":
        return _nvfp4(scheme, shape)
    if form == FLOAT and simple and (scheme.input_activations is None or scheme.input_activations.dynamic is True):
        return ("weight", "F8_E4M3", shape), ("weight_scale", "BF16", _scale_shape(weights, shape))
    if form == PACKED_INT and simple and scheme.input_activations is None:
        packed = (shape[0], math.ceil(shape[1] * weights.num_bits / 32))
        return (
            ("weight_packed", "I32", packed),
            ("weight_scale", "BF16", _scale_shape(weights, shape)),
            ("weight_shape", "I64", (2,)),
        )
    return probe(scheme, shape)


def _nvfp4(scheme: Scheme, shape: Shape) -> tuple[StoredTensor, ...]:
    out, columns = shape
    stored: list[StoredTensor] = [
        ("weight_packed", "U8", (out, columns // 2)),
        ("weight_scale", "F8_E4M3", (out, columns // 16)),
        ("weight_global_scale", "F32", (1,)),
    ]
    inputs = scheme.input_activations
    if inputs is not None and inputs.strategy == "tensor_group":
        stored.append(("input_global_scale", "F32", (1,)))
    return tuple(stored)


def _scale_shape(weights: QuantArgs, shape: Shape) -> Shape:
    out, columns = shape
    if weights.strategy == "block":
        assert weights.block_structure is not None
        rows, width = weights.block_structure
        return (math.ceil(out / rows), columns // width)
    if weights.strategy in ("group", "tensor_group"):
        assert weights.group_size is not None
        return (out, columns // weights.group_size)
    return (out, 1) if weights.strategy == "channel" else (1,)


def _check_fit(weights: QuantArgs, shape: Shape) -> None:
    width = weights.block_structure[1] if weights.block_structure else weights.group_size
    if width and width > 0 and shape[1] % width:
        raise RecipeError(
            "A targeted linear does not fit the scheme's group or block",
            expected=f"a number of columns that is a multiple of {width}",
            found=f"shape {list(shape)}",
            hint="choose another group_size or block_structure, or do not target this projection",
        )


def as_library_scheme(scheme: Scheme) -> Any:
    """The same scheme as compressed-tensors' own `QuantizationScheme` (imports it: seconds)."""
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme.model_validate(scheme_dict(scheme))


def scheme_dict(scheme: Scheme) -> dict[str, Any]:
    """Plain dict of what the user set, for llmcompressor's recipe; the format is always stated.

    Stated because compressed-tensors infers none for `DeepseekV4GroupedLinear` (o_a_proj): it looks the exact
    class up in `COMPRESSIBLE_MODULE_TYPES`.
    """
    return {**scheme.model_dump(mode="json", exclude_unset=True), "format": scheme.compression_format}


def _infer_with_library(scheme: Scheme) -> str:
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme

    plain = scheme.model_dump(mode="json", exclude_unset=True, exclude={"format"})
    return str(infer_module_format(torch.nn.Linear, QuantizationScheme.model_validate(plain)).value)


def probe(scheme: Scheme, shape: Shape) -> tuple[StoredTensor, ...]:
    """Ask compressed-tensors: quantize and compress a meta-device linear, read what it would store.

    Raises:
        RecipeError: compressed-tensors cannot express or compress this scheme.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import initialize_module_for_quantization
    from compressed_tensors.utils import get_direct_state_dict

    names = {
        torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3",
        torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
    }  # fmt: skip
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=torch.bfloat16)
    try:
        initialize_module_for_quantization(linear, as_library_scheme(scheme))
        compressor = BaseCompressor.get_value_from_registry(scheme.compression_format)
        state = compressor.compress(get_direct_state_dict(linear), linear.quantization_scheme)
        stored = tuple((k, names[v.dtype], tuple(v.shape)) for k, v in state.items() if v is not None)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise RecipeError(
            "compressed-tensors cannot store a linear under this scheme",
            where=f"shape {list(shape)}, format {scheme.compression_format}",
            found=error,
        ) from error
    return tuple(sorted(stored, key=lambda item: not item[0].startswith("weight")))


_PUBLISHED_ARGS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype",
)  # fmt: skip


def published_args(args: QuantArgs | None) -> dict[str, Any] | None:
    """`args` as config.json states them: all fields that compressed-tensors 0.17 knows, observers left out.

    An observer only matters while calibrating, and a name that only dsv4q registers would be refused elsewhere.
    """
    if args is None:
        return None
    fields = args.model_dump(mode="json")
    return {key: fields[key] for key in _PUBLISHED_ARGS} | {"observer": None, "observer_kwargs": {}}
