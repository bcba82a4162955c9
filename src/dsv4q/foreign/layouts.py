"""What a checkpoint's tensors stand for, in whatever common layout they are stored: header facts only, no weights.

A linear `X` is stored as a weight and its scales. Which layout it is, is told by names and dtypes of each linear on
its own, because releases mix them (NVFP4 experts of ModelOpt beside DeepSeek's own FP8):

| layout                          | weight                  | scales                                                    | value |
|---------------------------------|-------------------------|-----------------------------------------------------------|-------|
| compressed-tensors NVFP4        | `weight_packed` U8      | `weight_scale` F8_E4M3, `weight_global_scale` (a divisor) | q * s / g |
| ModelOpt NVFP4                  | `weight` U8             | `weight_scale` F8_E4M3, `weight_scale_2` (a multiplier)   | q * s * g |
| DeepSeek MXFP4                  | `weight` I8 or U8       | `scale` F8_E8M0 or U8                                     | q * 2^(s - 127) |
| compressed-tensors, ModelOpt MXFP4 | `weight_packed`, `weight` U8 | `weight_scale` U8 or F8_E8M0                      | q * 2^(s - 127) |
| FP8 of all of them, and MXFP8   | `weight` F8_E4M3        | `weight_scale`, `weight_scale_inv` or `scale`; per tensor, row, group or block | q * s |
| compressed-tensors INT          | `weight_packed` I32 or `weight` I8 | `weight_scale`, `weight_zero_point`, `weight_g_idx`, `weight_shape` | (q - z) * s |

Input scales are tensors of their own: `input_global_scale` of compressed-tensors is a divisor, `input_scale` of
ModelOpt a multiplier, so they are compared as multipliers under the name `X.input_scale`.

Names are DeepSeek's own. `model.` in front of them and transformers' names for the same modules are translated.
Sources: compressed-tensors 0.19 `compressors/*/base.py`; ModelOpt `torch/export/quant_utils.py` and
`examples/deepseek/deepseek_v4/quantize_to_nvfp4.py`; the native layout as in `native.py`.
"""  # noqa: E501 - a table

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import SourceError
from dsv4q.formats.stored import E2M1, E4M3, INTEGER, StoredForm
from dsv4q.layout import HEAD_COPIES, Dims, Shape, TensorSpec, source_tensors

INPUT_SCALE, OTHER = "input scale", "other"
"""Classes of what is not a tensor of the model."""

_WEIGHTS = ("weight_packed", "weight")
_SCALES = ("weight_scale", "weight_scale_inv", "scale")
_GLOBALS = ("weight_global_scale", "weight_scale_2")
_COMPANIONS = (*_SCALES, *_GLOBALS, "weight_shape", "weight_zero_point", "weight_g_idx")
_INPUTS = ("input_scale", "input_global_scale")
_E8M0 = ("U8", "F8_E8M0")
_SCALE_FLOATS = ("F32", "BF16", "F16", "F64")
_CODED = ("U8", "I8", "I32", "F8_E4M3")
"""Dtypes of a weight that means nothing without its scales."""
_KNOWN_SUFFIXES = frozenset({*_WEIGHTS, *_COMPANIONS, *_INPUTS})


@dataclass(frozen=True, slots=True)
class Logical:
    """One tensor of the model, or an input scale, and what it is stored as."""

    name: str
    """DeepSeek's own name where it is known, else that of the file."""
    form: str
    """For people: `BF16`, `NVFP4 (compressed-tensors)`, `FP8 128x128`, `INT4 groups of 32` …"""
    shape: Shape
    """Of the values."""
    parts: Mapping[str, TensorEntry]
    """Suffix -> entry in a file; one of them if it is stored as it is."""
    encoding: StoredForm | None = None
    """None: stored as it is, or (`unknown`) in a way that nobody here can decode."""
    unknown: str = ""
    """Why its values cannot be told."""
    reciprocal: bool = False
    """The stored number is the divisor of what is compared."""

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.parts.values())


# ------------------------------------------------------------------------------------------------ names


class Names:
    """Names of files to names of the model, and the classes that these are counted under.

    The layout is that of the first config.json that describes a DeepSeek-V4; without one all is of class `other`.
    """

    def __init__(self, *configs: Mapping[str, Any]) -> None:
        layouts = (_layout(config) for config in configs)
        self._specs = {spec.name: spec for spec in next((found for found in layouts if found), ())}
        self._by_hf = {spec.hf_name: spec.name for spec in self._specs.values()}
        self._modules = {s.hf_name.rpartition(".")[0]: s.module for s in self._specs.values() if s.module}

    def canonical(self, name: str) -> str:
        """DeepSeek's own name of a tensor; without a leading `model.` where the layout does not know it."""
        if name in self._specs:
            return name
        if name in self._by_hf:
            return self._by_hf[name]
        module, _, suffix = name.rpartition(".")
        if module in self._modules and suffix in _KNOWN_SUFFIXES:
            return f"{self._modules[module]}.{suffix}"
        return name.removeprefix("model.")

    def class_of(self, name: str) -> str:
        """The class of a logical tensor: its role in the layout, with `mtp: ` in front for the draft's."""
        if is_input_scale(name):
            return INPUT_SCALE
        spec = self._specs.get(name)
        if spec is not None:
            return spec.class_name
        for suffix, main in HEAD_COPIES.items():
            if name.startswith("mtp.") and name.endswith(suffix) and main in self._specs:
                return f"mtp: {self._specs[main].role}"
        return OTHER


def is_input_scale(name: str) -> bool:
    """Whether a logical tensor is what a module's input is scaled by."""
    return name.endswith(".input_scale")


def _layout(config: Mapping[str, Any]) -> list[TensorSpec]:
    """The tensors that config.json describes; none for a model that is not DeepSeek-V4."""
    try:
        return source_tensors(Dims.from_config(config))
    except SourceError:
        return []


# ------------------------------------------------------------------------------------------------ forms


def logical_tensors(checkpoint: Checkpoint, names: Names) -> dict[str, Logical]:
    """Every tensor of the model that a checkpoint holds, by name, in the order of the files.

    Reads no data but the `weight_shape` of packed integers.

    Raises:
        SourceError: such a tensor cannot be read.
    """
    blocks = _stated_blocks(checkpoint.config)
    renamed = Counter(names.canonical(name) for name in checkpoint.tensors)
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for entry in sorted(checkpoint.tensors.values(), key=lambda e: (e.file, e.start)):
        name = names.canonical(entry.name)
        # Two files' names for one tensor: each stays what it is.
        module, _, suffix = (name if renamed[name] == 1 else entry.name).rpartition(".")
        modules[module][suffix] = entry
    found = {}
    for module, there in modules.items():
        for logical in _of_module(checkpoint, module, there, blocks):
            found[logical.name] = logical
    return found


def _of_module(
    checkpoint: Checkpoint, module: str, there: Mapping[str, TensorEntry], blocks: Iterable[tuple[int, int]]
) -> Iterator[Logical]:
    weight = next((suffix for suffix in _WEIGHTS if suffix in there and there[suffix].dtype in _CODED), None)
    left = dict(there)
    if weight is not None:
        parts = {suffix: there[suffix] for suffix in (weight, *_COMPANIONS) if suffix in there}
        if len(parts) > 1:
            left = {suffix: entry for suffix, entry in there.items() if suffix not in parts}
            name = "weight" if "weight" not in left else weight
            yield _coded(checkpoint, f"{module}.{name}", weight, parts, blocks)
    for suffix, entry in left.items():
        if suffix in _INPUTS and not set(_INPUTS) <= left.keys():
            inverse = suffix == "input_global_scale"
            form = f"{entry.dtype} {'divisor' if inverse else 'multiplier'}"
            yield Logical(f"{module}.input_scale", form, entry.shape, {suffix: entry}, reciprocal=inverse)
        else:
            yield Logical(f"{module}.{suffix}" if module else suffix, entry.dtype, entry.shape, {suffix: entry})


def _coded(
    checkpoint: Checkpoint,
    name: str,
    weight: str,
    parts: Mapping[str, TensorEntry],
    blocks: Iterable[tuple[int, int]],
) -> Logical:
    entry = parts[weight]
    scale = next((suffix for suffix in _SCALES if suffix in parts), None)
    if len(entry.shape) != 2 or scale is None:
        return _unknown(name, parts, "a weight [out, in] with scales is expected")
    if entry.dtype == "I32":
        return _packed_integers(checkpoint, name, weight, parts, blocks)
    kind = parts[scale].dtype
    if entry.dtype == "U8" and kind == "F8_E4M3":
        return _nvfp4(name, weight, scale, parts)
    if entry.dtype in ("U8", "I8") and kind in _E8M0:
        shape = (entry.shape[0], entry.shape[1] * 2)
        return _scaled(name, "MXFP4", E2M1, shape, scale, parts, blocks)
    if entry.dtype == "F8_E4M3":
        form = "MXFP8" if kind in _E8M0 and parts[scale].shape == (entry.shape[0], entry.shape[1] // 32) else "FP8"
        return _scaled(name, form, E4M3, entry.shape, scale, parts, blocks)
    if entry.dtype == "I8" and kind in _SCALE_FLOATS:
        return _scaled(name, "INT8", INTEGER, entry.shape, scale, parts, blocks)
    return _unknown(name, parts, f"no known layout has {weight} {entry.dtype} with {scale} {kind}")


def _nvfp4(name: str, weight: str, scale: str, parts: Mapping[str, TensorEntry]) -> Logical:
    rows, packed = parts[weight].shape
    wide = next((suffix for suffix in _GLOBALS if suffix in parts), None)
    if wide is None:
        return _unknown(name, parts, f"NVFP4 needs one of {' and '.join(_GLOBALS)}")
    if parts[scale].shape != (rows, packed // 8) or packed % 8 or _count(parts[wide].shape) != 1:
        return _unknown(name, parts, f"scales {_shapes(parts)} do not fit NVFP4 {[rows, 2 * packed]}")
    form = "NVFP4 (compressed-tensors)" if wide == "weight_global_scale" else "NVFP4 (ModelOpt)"
    return Logical(name, form, (rows, 2 * packed), parts, StoredForm(E2M1, (1, 16), scale, global_scale=wide))


def _packed_integers(
    checkpoint: Checkpoint,
    name: str,
    weight: str,
    parts: Mapping[str, TensorEntry],
    blocks: Iterable[tuple[int, int]],
) -> Logical:
    stated = parts.get("weight_shape")
    if stated is None or stated.dtype not in ("I64", "I32") or _count(stated.shape) != 2:
        return _unknown(name, parts, "packed integers need weight_shape, two integers")
    raw, size = checkpoint.read(stated.name), stated.nbytes // 2
    rows, columns = (int.from_bytes(raw[i * size : (i + 1) * size], "little", signed=True) for i in range(2))
    words = parts[weight].shape
    bits = [b for b in range(1, 9) if rows == words[0] and columns > 0 and -(-columns * b // 32) == words[1]]
    if len(bits) != 1:
        return _unknown(name, parts, f"weight_shape {[rows, columns]} does not fit {weight} {list(words)}")
    scale = next(suffix for suffix in _SCALES if suffix in parts)
    return _scaled(name, f"INT{bits[0]}", INTEGER, (rows, columns), scale, parts, blocks, bits[0])


def _scaled(
    name: str,
    form: str,
    codes: str,
    shape: Shape,
    scale: str,
    parts: Mapping[str, TensorEntry],
    blocks: Iterable[tuple[int, int]],
    bits: int = 8,
) -> Logical:
    block = _block((shape[0], shape[1]), parts[scale].shape, blocks)
    if block is None:
        return _unknown(name, parts, f"{scale} {list(parts[scale].shape)} does not fit a weight {list(shape)}")
    zero = " with zero points" if "weight_zero_point" in parts else ""
    told = form if form.startswith("MX") else f"{form} {_block_text(block, shape)}{zero}"
    return Logical(name, told, shape, parts, StoredForm(codes, block, scale, bits))


def _unknown(name: str, parts: Mapping[str, TensorEntry], reason: str) -> Logical:
    main = next(iter(parts.values()))
    return Logical(name, f"{main.dtype} with {', '.join(list(parts)[1:])}", main.shape, parts, unknown=reason)


def _block(shape: tuple[int, int], scale: Shape, stated: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Rows and columns that share a scale of these shapes; None if nothing fits."""
    out, columns = shape
    if len(scale) == 4 and scale[1] == scale[3] == 1:  # ModelOpt's FP8 blocks: [out/128, 1, in/128, 1]
        scale = (scale[0], scale[2])
    if len(scale) < 2 and _count(scale) == 1:
        return shape
    if len(scale) == 1:
        return (1, columns) if scale[0] == out else None
    if len(scale) != 2:
        return None
    guess = (-(-out // scale[0]) if scale[0] else 0, -(-columns // scale[1]) if scale[1] else 0)
    rowwise = [(1, guess[1])] if scale[0] == out else []
    for rows, width in (*rowwise, *stated, (128, 128), guess):
        if rows > 0 and width > 0 and scale == (-(-out // rows), -(-columns // width)):
            return rows, width
    return None


def _stated_blocks(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Block sizes that quantization_config names; of anything odd none."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return ()
    found = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    return tuple((b[0], b[1]) for b in found if isinstance(b, list) and len(b) == 2 and all(type(n) is int for n in b))


def _block_text(block: tuple[int, int], shape: Shape) -> str:
    rows, columns = block
    if block == shape:
        return "per tensor"
    if rows == 1:
        return "per row" if columns == shape[1] else f"groups of {columns}"
    return f"{rows}x{columns}"


def _shapes(parts: Mapping[str, TensorEntry]) -> str:
    return ", ".join(f"{suffix} {list(entry.shape)}" for suffix, entry in parts.items())


def _count(shape: Shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
