"""The artifact's quantization_config, judged alone: how each linear is stored, and whether the consumer sees it so.

The formats of the contract, and packed integers as they are commonly served, are known in closed form (`schemes.py`).
NVFP4 and FP8 in blocks must be exactly those: the consumer has no other. Any other scheme is put to compressed-tensors
(`library.py`).

What the targets and ignore entries do with each linear is played through in `simulation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4q.layout import SLIDING, Dims, TensorSpec
from dsv4q.verify.library import library_scheme
from dsv4q.verify.result import Log
from dsv4q.verify.schemes import FP8, INT, NVFP4, Refused, StoredScheme, closed_scheme
from dsv4q.verify.simulation import CONFIG, Patterns, Simulation, TargetGroup

# Fields of compressed-tensors 0.17 (`quantization/quant_config.py`, `quant_scheme.py`, `quant_args.py`), which refuses
# unknown ones in groups and arguments; `version`, `sparsity_config` and `transform_config` are read by its consumers.
ARCHITECTURE = "DeepseekV4ForCausalLM"
TOP_FIELDS = frozenset({
    "config_groups", "quant_method", "kv_cache_scheme", "format", "quantization_status", "global_compression_ratio",
    "ignore", "version", "sparsity_config", "transform_config",
})  # fmt: skip
GROUP_FIELDS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
ARGS_FIELDS = frozenset({
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
})  # fmt: skip
STOCK_OBSERVERS = frozenset({
    "memoryless_minmax", "static_minmax", "minmax", "memoryless_mse", "mse", "nvfp4_expanded_mse", "fouroversix",
    "imatrix_mse", "nvfp4_expanded_imatrix",
})  # fmt: skip

_ARGS_DEFAULTS: dict[str, Any] = {
    "num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": None, "block_structure": None,
    "dynamic": False,
}  # fmt: skip

# What the arguments of each format must say; a field that is not named here is free.
_FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_WEIGHTS: dict[str, dict[str, Any]] = {
    NVFP4: {**_FP4, "dynamic": False},
    FP8: {**_FP8, "strategy": "block", "block_structure": [128, 128], "dynamic": False},
    INT: {"type": "int", "symmetric": True, "dynamic": False},
}
_INPUTS: dict[str, dict[str, Any]] = {
    NVFP4: {**_FP4, "dynamic": "local"},
    FP8: {**_FP8, "strategy": "group", "group_size": 128, "dynamic": True},
}
_GENERAL = ("int-quantized", "naive-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
"""Formats of compressed-tensors 0.19 that store a quantized linear, without those above."""
_SCALE_DTYPES: dict[str, frozenset[Any]] = {NVFP4: frozenset({None, "torch.float8_e4m3fn"})}


def judge_config(
    config: Mapping[str, Any], dims: Dims, specs: Sequence[TensorSpec], log: Log
) -> dict[str, StoredScheme]:
    """Check quantization_config; returns the scheme of every main linear that it quantizes, by upstream module name."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        _wrong(log, "quantization_config: an object", type(quantization).__name__)
        return {}
    groups = _groups(quantization, log)
    ignore = Patterns(_strings(quantization.get("ignore"), "ignore", log), "ignore", log)
    _check_top(quantization, groups, log)
    return Simulation(dims, groups, ignore, log).run(specs)


def judge_model_config(config: Mapping[str, Any], dims: Dims, log: Log) -> None:
    """What of config.json decides how the consumer reads the files, without a source to compare with.

    vLLM takes the class from `architectures`, and the attention of a draft layer from the entry of `compress_ratios`
    behind those of the main layers.
    """
    log.looked_at("config")
    architectures = config.get("architectures", [ARCHITECTURE])
    if architectures != [ARCHITECTURE]:
        _wrong(log, f"architectures: {[ARCHITECTURE]}", repr(architectures)[:80])
    draft = config["compress_ratios"][dims.layers :][: dims.draft.stages]
    if draft != [SLIDING] * dims.draft.stages:
        expected = f"compress_ratios with {dims.draft.stages} times {SLIDING} behind those of the main layers"
        _wrong(log, expected, repr(draft))


# ------------------------------------------------------------------------------------------------ fields


def _wrong(log: Log, expected: str, found: object) -> None:
    log.differs("config", file=CONFIG, expected=expected, found=found)


def _strings(value: object, where: str, log: Log) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    _wrong(log, f"{where}: a list of strings", repr(value)[:80])
    return []


def _unknown(value: Mapping[str, Any], known: frozenset[str], where: str, log: Log) -> None:
    for key in sorted(set(value) - known):
        _wrong(log, f"only fields that compressed-tensors 0.17 knows in {where}", key)


def _must_be(value: Mapping[str, Any], key: str, expected: object, where: str, log: Log) -> None:
    found = value.get(key, "no such key")
    log.looked_at("config")
    # 1 == True in Python, and a JSON true where a number belongs is wrong.
    if found != expected or type(found) is not type(expected):
        _wrong(log, f"{where}{key}: {expected!r}", repr(found))


def _check_top(quantization: Mapping[str, Any], groups: Sequence[TargetGroup], log: Log) -> None:
    where = "quantization_config."
    _unknown(quantization, TOP_FIELDS, "quantization_config", log)
    _must_be(quantization, "quant_method", "compressed-tensors", where, log)
    _must_be(quantization, "quantization_status", "compressed", where, log)
    formats = {group.scheme.format for group in groups if group.scheme}
    if formats and all(group.scheme for group in groups):
        _must_be(quantization, "format", "mixed-precision" if len(formats) > 1 else formats.pop(), where, log)
    if not isinstance(quantization.get("version"), str):
        _wrong(log, f"{where}version: a string", repr(quantization.get("version")))
    for key in ("kv_cache_scheme", "global_compression_ratio", "sparsity_config", "transform_config"):
        if quantization.get(key):
            _wrong(log, f"{where}{key}: null", repr(quantization[key])[:80])


def _groups(quantization: Mapping[str, Any], log: Log) -> list[TargetGroup]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _wrong(log, "config_groups: an object with groups", repr(groups)[:80])
        return []
    made = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict):
            _wrong(log, f"{where}: an object", type(group).__name__)
            continue
        _unknown(group, GROUP_FIELDS, where, log)
        targets = Patterns(_strings(group.get("targets"), f"{where}.targets", log), f"{where}.targets", log)
        made.append(TargetGroup(name, targets, _scheme(name, group, where, log)))
    return made


def _scheme(name: str, group: Mapping[str, Any], where: str, log: Log) -> StoredScheme | None:
    kind = group.get("format")
    if kind not in (*_WEIGHTS, *_GENERAL):
        formats = ", ".join((*_WEIGHTS, *_GENERAL))
        _wrong(log, f"{where}.format: one of {formats}", repr(kind))
        return None
    weights = _arguments(group.get("weights"), f"{where}.weights", log)
    if weights is None:
        return None
    if group.get("output_activations") is not None:
        _wrong(log, f"{where}.output_activations: null", "something else")
    if not _is_closed(kind, weights, group.get("input_activations")):
        return _general_scheme(name, str(kind), group, weights, where, log)
    _check_arguments(weights, _WEIGHTS[kind], kind, f"{where}.weights.", log)
    inputs = group.get("input_activations")
    # NVFP4 without input_activations is weight-only and has no input scale. FP8 attention without them is fatal.
    if kind in _INPUTS and (inputs is not None or kind == FP8):
        arguments = _arguments(inputs, f"{where}.input_activations", log)
        if arguments is not None:
            _check_arguments(arguments, _INPUTS[kind], kind, f"{where}.input_activations.", log)
    bits = weights["num_bits"]
    return closed_scheme(
        name, kind, bits if isinstance(bits, int) else 0, weights.get("group_size"), inputs is not None
    )


def _is_closed(kind: str, weights: Mapping[str, Any], inputs: object) -> bool:
    """Whether the scheme is of a family that is written down here, right or wrong."""
    if kind == FP8:
        return weights["strategy"] == "block"
    if kind == INT:
        wanted = all(weights[key] == value for key, value in _WEIGHTS[INT].items())
        return wanted and inputs is None and weights["num_bits"] in (4, 8) and _is_by_group_or_row(weights)
    return kind == NVFP4


def _is_by_group_or_row(weights: Mapping[str, Any]) -> bool:
    size, strategy = weights["group_size"], weights["strategy"]
    if strategy in (None, "group") and isinstance(size, int) and size > 0:
        return True
    return strategy == "channel" and size is None


def _general_scheme(
    name: str, kind: str, group: Mapping[str, Any], weights: Mapping[str, Any], where: str, log: Log
) -> StoredScheme | None:
    """A scheme that compressed-tensors knows; a difference, and None, where it does not."""
    _check_arguments(weights, {"dynamic": False}, kind, f"{where}.weights.", log, any_scale_dtype=True)
    inputs = group.get("input_activations")
    if inputs is not None:
        arguments = _arguments(inputs, f"{where}.input_activations", log)
        if arguments is None:
            return None
        _check_arguments(arguments, {}, kind, f"{where}.input_activations.", log, any_scale_dtype=True)
    try:
        return library_scheme(name, kind, group)
    except Refused as error:
        expected = f"{where}: a scheme that compressed-tensors knows"
        _wrong(log, expected, error)
    return None


def _arguments(value: object, where: str, log: Log) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        _wrong(log, f"{where}: an object", "null" if value is None else repr(value))
        return None
    _unknown(value, ARGS_FIELDS, where, log)
    return _ARGS_DEFAULTS | value


def _check_arguments(
    arguments: Mapping[str, Any],
    expected: Mapping[str, Any],
    kind: str,
    where: str,
    log: Log,
    *,
    any_scale_dtype: bool = False,
) -> None:
    for key, value in expected.items():
        _must_be(arguments, key, value, where, log)
    observer = arguments.get("observer")
    if observer is not None and observer not in STOCK_OBSERVERS:
        _wrong(log, f"{where}observer: null or a stock one", repr(observer))
    if not isinstance(arguments.get("observer_kwargs", {}), dict):
        _wrong(log, f"{where}observer_kwargs: an object", "something else")
    allowed = _SCALE_DTYPES.get(kind, frozenset({None}))
    if not any_scale_dtype and arguments.get("scale_dtype") not in allowed:
        found = repr(arguments["scale_dtype"])
        _wrong(log, f"{where}scale_dtype: one of {sorted(map(str, allowed))}", found)
