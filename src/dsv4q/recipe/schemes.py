"""Compressed-tensors schemes as data: what a scheme stores for one linear, and how config.json states it.

`weights` and `input_activations` hold the fields of compressed-tensors' `QuantizationArgs`; its own classes are
not imported here because that costs seconds and a plan must be instant. The common formats are written down in
closed form; any other scheme is put to compressed-tensors itself, on the meta device. A test compares the two.

Source of the formats: compressed-tensors 0.19 `compressors/{nvfp4,naive_quantized,pack_quantized}`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from dsv4q.errors import RecipeError
from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.layout import Shape

NVFP4 = "nvfp4-pack-quantized"
FLOAT = "float-quantized"
PACKED_INT = "pack-quantized"
MIXED = "mixed-precision"

Format = Literal[
    "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
]  # fmt: skip
"""Formats of compressed-tensors 0.19 that store a quantized module."""

StoredTensor = tuple[str, str, Shape]
"""Suffix behind the module's name, safetensors dtype, shape."""


OBSERVERS = (
    "memoryless_minmax", "static_minmax", "minmax", "memoryless_mse", "mse", "nvfp4_expanded_mse", "fouroversix",
    "exact_nvfp4", "exact_fp8_block",
)  # fmt: skip
"""Observers that a recipe may name: llmcompressor's that need no activations for weights, and ours."""

_LOWERED = ("type", "strategy", "dynamic", "actorder")
_TORCH_DTYPES = (
    "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16", "float16", "float32", "float64",
    "uint8", "int8", "int16", "int32", "int64",
)  # fmt: skip


class QuantArgs(BaseModel):
    """How one operand (weight or input) is quantized; the fields of compressed-tensors' `QuantizationArgs`.

    Whatever compressed-tensors would refuse is refused here too, because a plan must not promise what a run cannot
    do, and hours later.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: int = Field(8, ge=1, le=16)
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group"] = "tensor"
    """Left out: `group` or `channel` if there is a group_size (-1 means a whole row), else `tensor`."""
    group_size: int | None = None
    block_structure: tuple[PositiveInt, PositiveInt] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: Literal["weight", "static", False] | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _normal_form(cls, raw: Any) -> Any:
        """What the libraries do before they look: lower case, observer names by `_`, strategy inferred."""
        if not isinstance(raw, dict):
            return raw
        lower = {k: v.lower() for k, v in raw.items() if k in _LOWERED and isinstance(v, str)}
        raw = {**raw, **lower}
        if isinstance(raw.get("observer"), str):
            raw["observer"] = raw["observer"].lower().replace("-", "_")
        if raw.get("strategy") is None:
            size = raw.get("group_size")
            raw["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
        block = raw.get("block_structure")
        if isinstance(block, str):
            raw["block_structure"] = block.split("x")
        return raw

    @field_validator("scale_dtype", "zp_dtype")
    @classmethod
    def _is_dtype(cls, value: str | None) -> str | None:
        if value is not None and value.removeprefix("torch.") not in _TORCH_DTYPES:
            raise ValueError(f"no such torch dtype; one of {', '.join(_TORCH_DTYPES)}")
        return value

    @field_validator("observer")
    @classmethod
    def _is_observer(cls, value: str | None) -> str | None:
        if value is not None and value not in OBSERVERS:
            raise ValueError(f"no such observer; one of {', '.join(OBSERVERS)}")
        return value

    @model_validator(mode="after")
    def _agree(self) -> QuantArgs:
        grouped, size = self.strategy in ("group", "tensor_group"), self.group_size
        if grouped and (size is None or size <= 0):
            raise ValueError(f"strategy {self.strategy} needs a group_size above zero")
        if not grouped and size not in (None, -1):
            raise ValueError(f"group_size and strategy {self.strategy} disagree")
        if (self.strategy == "block") != (self.block_structure is not None):
            raise ValueError("strategy block and a block_structure such as [128, 128] need each other")
        if self.dynamic == "local" and self.strategy != "tensor_group":
            raise ValueError("dynamic: local needs strategy tensor_group")
        if self.dynamic is True and self.strategy in ("channel", "block"):
            raise ValueError(f"dynamic: true and strategy {self.strategy} disagree")
        if self.strategy == "token" and self.dynamic is not True:
            raise ValueError("strategy token needs dynamic: true")
        if self.type == "float" and self.num_bits not in (4, 8):
            raise ValueError("type float has 4 or 8 bits")
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
    format: Format | None = None

    @model_validator(mode="after")
    def _agree(self) -> Scheme:
        if not self.targets:
            raise ValueError("a config group needs at least one target")
        if self.output_activations is not None:
            raise ValueError("output_activations are not supported: the consumer has no place for them")
        if self.weights.dynamic:
            raise ValueError("weights cannot be dynamic: an artifact stores their scales")
        if self.input_activations is not None:
            self._check_inputs(self.input_activations)
        elif self.weights.strategy == "block" and self.weights.type == "float":
            raise ValueError("FP8 block weights need input_activations: vLLM cannot load them without")
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

    @staticmethod
    def _check_inputs(inputs: QuantArgs) -> None:
        if inputs.strategy in ("channel", "block"):
            raise ValueError(f"inputs cannot be quantized with strategy {inputs.strategy}")
        if inputs.actorder:
            raise ValueError("actorder is for weights")
        if inputs.observer is not None and inputs.observer.startswith("exact_"):
            raise ValueError(f"observer {inputs.observer} is for weights")

    @property
    def in_stacks(self) -> bool:
        """Whether routed experts are encoded all at once (`run/stacked.py`), not module by module under observers."""
        weights, inputs = self.weights, self.input_activations
        return (
            self.compression_format == NVFP4
            and weights.symmetric
            and weights.strategy == "tensor_group"
            and weights.observer in (None, "exact_nvfp4", "memoryless_minmax", "static_minmax", "minmax")
            and (inputs is None or (inputs.dynamic == "local" and inputs.observer == "static_minmax"))
        )

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
    if weights.type == "int" and weights.num_bits <= 8 and inputs is None:
        return PACKED_INT
    return _infer_with_library(scheme)


def stored_tensors(scheme: Scheme, shape: Shape) -> tuple[StoredTensor, ...]:
    """What an artifact stores for a BF16 linear of `shape` [out, in] under `scheme`, the weight first.

    Raises:
        RecipeError: the shape does not fit the scheme (columns not a multiple of the group or block).
    """
    weights, inputs, form = scheme.weights, scheme.input_activations, scheme.compression_format
    _check_fit(weights, shape)
    kind = (weights.type, weights.num_bits)
    no_input_scale = inputs is None or inputs.dynamic is True
    if weights.symmetric and weights.strategy in ("tensor", "channel", "group", "block"):
        if form == FLOAT and kind == ("float", 8) and no_input_scale:
            return ("weight", "F8_E4M3", shape), ("weight_scale", "BF16", _scale_shape(weights, shape))
        if form == PACKED_INT and weights.type == "int" and no_input_scale:
            return (
                ("weight_packed", "I32", (shape[0], math.ceil(shape[1] * weights.num_bits / 32))),
                ("weight_scale", "BF16", _scale_shape(weights, shape)),
                ("weight_shape", "I64", (2,)),
            )
    if form == NVFP4 and _is_plain_nvfp4(weights) and (inputs is None or inputs.dynamic is not False):
        return _nvfp4(scheme, shape)
    return probe(scheme, shape)


def _is_plain_nvfp4(weights: QuantArgs) -> bool:
    return (
        (weights.type, weights.num_bits, weights.strategy, weights.group_size) == ("float", 4, "tensor_group", 16)
        and weights.symmetric
        and weights.scale_dtype in (None, "torch.float8_e4m3fn", "float8_e4m3fn")
    )


def _nvfp4(scheme: Scheme, shape: Shape) -> tuple[StoredTensor, ...]:
    out, columns = shape
    stored: list[StoredTensor] = [
        ("weight_packed", "U8", (out, columns // 2)),
        ("weight_scale", "F8_E4M3", (out, columns // 16)),
        ("weight_global_scale", "F32", (1,)),
    ]
    if scheme.input_activations is not None and scheme.input_activations.dynamic == "local":
        stored.append(("input_global_scale", "F32", (1,)))
    return tuple(stored)


def _scale_shape(weights: QuantArgs, shape: Shape) -> Shape:
    out, columns = shape
    if weights.strategy == "block":
        assert weights.block_structure is not None
        rows, width = weights.block_structure
        return (math.ceil(out / rows), columns // width)
    if weights.strategy == "group":
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

    names = {torch_dtypes()[name]: name for name in _STORED_DTYPES}
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=torch.bfloat16)
    try:
        initialize_module_for_quantization(linear, as_library_scheme(scheme))
        compressor = BaseCompressor.get_value_from_registry(scheme.compression_format)
        state = compressor.compress(get_direct_state_dict(linear), linear.quantization_scheme)
        stored = {k: (names[v.dtype], tuple(v.shape)) for k, v in state.items() if v is not None}
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise RecipeError(
            "compressed-tensors cannot store a linear under this scheme",
            where=f"shape {list(shape)}, format {scheme.compression_format}",
            found=error,
        ) from error
    zero_point = stored.get("weight_zero_point")
    if zero_point and scheme.compression_format == PACKED_INT and scheme.weights.strategy in ("group", "channel"):
        # Packed along the rows, but not by its path for meta tensors.
        rows = math.ceil(shape[0] * scheme.weights.num_bits / 32)
        stored["weight_zero_point"] = ("I32", (rows, *zero_point[1][1:]))
    entries = ((name, *entry) for name, entry in stored.items())
    return tuple(sorted(entries, key=lambda item: not item[0].startswith("weight")))


_STORED_DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "U8", "I8", "I32", "I64")
"""Dtypes that a linear may be stored as; a scheme that wants another is refused."""
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
