"""The artifact's quantization_config, judged alone: how each linear is stored, and whether the consumer sees it so.

The formats of the contract, and packed integers as they are commonly served, are written down here in closed form.
NVFP4 and FP8 in blocks must be exactly those: the consumer has no other. Any other scheme is put to compressed-tensors
(`library.py`), whose import takes seconds and is therefore left until then.

The consumer (vLLM) builds the main model under upstream names, the draft under `model.layers.{num_hidden_layers + i}`
with the same quantization_config, and asks of every linear: does a target match, does an ignore entry match. A target
or ignore entry is a regular expression for `re.match` after `re:`, else an exact name or the class name `Linear`
(compressed-tensors `utils/match.py`). So this module plays that game for every linear in both vocabularies and under
every prefix, instead of looking for literal entries.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4q.layout import Dims, Role, Shape, TensorSpec
from dsv4q.verify.result import Log, few

CONFIG = "config.json"

# Fields of compressed-tensors 0.17 (`quantization/quant_config.py`, `quant_scheme.py`, `quant_args.py`), which refuses
# unknown ones in groups and arguments; `version`, `sparsity_config` and `transform_config` are read by its consumers.
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

NVFP4, FP8, INT = "nvfp4-pack-quantized", "float-quantized", "pack-quantized"

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

Stored = dict[str, tuple[tuple[str, ...], Shape]]
"""Suffix behind the module's name -> dtypes allowed, shape."""


@dataclass(frozen=True)
class Scheme:
    """How a group stores its linears."""

    group: str
    format: str
    bits: int
    columns: int | None
    """Columns per scale (integers); None: one scale per row."""
    input_scale: bool

    @property
    def is_general(self) -> bool:
        """Whether compressed-tensors, not this module, knows how it is stored (`LibraryScheme`)."""
        return False

    def stored(self, shape: Shape) -> Stored:
        """Tensors of a linear [out, in] in this scheme (contract.md; compressed-tensors' compressors)."""
        out, columns = shape
        if self.format == NVFP4:
            tensors: Stored = {
                "weight_packed": (("U8",), (out, columns // 2)),
                "weight_scale": (("F8_E4M3",), (out, columns // 16)),
                "weight_global_scale": (("F32",), (1,)),
            }
            return tensors | ({"input_global_scale": (("F32",), (1,))} if self.input_scale else {})
        if self.format == FP8:
            blocks = (-(-out // 128), -(-columns // 128))
            return {"weight": (("F8_E4M3",), shape), "weight_scale": (("BF16", "F32"), blocks)}
        return {
            "weight_packed": (("I32",), (out, -(-columns * self.bits // 32))),
            "weight_scale": (("BF16",), (out, -(-columns // (self.columns or columns)))),
            "weight_shape": (("I64",), (2,)),
        }


class _Patterns:
    """A list of targets or ignore entries."""

    def __init__(self, entries: Sequence[str], where: str, log: Log) -> None:
        self.exact = {entry for entry in entries if not entry.startswith("re:")}
        self.regexes: dict[str, re.Pattern[str]] = {}
        self.used: set[str] = set()
        for entry in entries:
            if entry.startswith("re:"):
                try:
                    self.regexes[entry] = re.compile(entry.removeprefix("re:"))
                except re.error as error:
                    log.differs(
                        "config", file=CONFIG, expected=f"a regular expression in {where}", found=f"{entry}: {error}"
                    )

    def match(self, name: str) -> str | None:
        """The entry that matches a linear of this name. All modules asked about are taken for linears."""
        found = name if name in self.exact else "Linear" if "Linear" in self.exact else None
        if found is None:
            found = next((entry for entry, regex in self.regexes.items() if regex.match(name)), None)
        if found is not None:
            self.used.add(found)
        return found

    def idle(self, names: Sequence[str]) -> list[str]:
        """Entries that match none of `names`."""
        regexes = [e for e, r in self.regexes.items() if e not in self.used and not any(map(r.match, names))]
        return regexes + sorted(self.exact - self.used - set(names))


@dataclass
class _Group:
    name: str
    targets: _Patterns
    scheme: Scheme | None


def judge_config(config: Mapping[str, Any], dims: Dims, specs: Sequence[TensorSpec], log: Log) -> dict[str, Scheme]:
    """Check quantization_config; returns the scheme of every main linear that it quantizes, by upstream module name."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        log.differs("config", file=CONFIG, expected="quantization_config: an object", found=type(quantization).__name__)
        return {}
    groups = _groups(quantization, log)
    ignore = _Patterns(_strings(quantization.get("ignore"), "ignore", log), "ignore", log)
    _check_top(quantization, groups, log)
    return _Simulation(dims, groups, ignore, log).run(specs)


# ------------------------------------------------------------------------------------------------ fields


def _strings(value: object, where: str, log: Log) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    log.differs("config", file=CONFIG, expected=f"{where}: a list of strings", found=repr(value)[:80])
    return []


def _unknown(value: Mapping[str, Any], known: frozenset[str], where: str, log: Log) -> None:
    for key in sorted(set(value) - known):
        log.differs(
            "config", file=CONFIG, expected=f"only fields that compressed-tensors 0.17 knows in {where}", found=key
        )


def _must_be(value: Mapping[str, Any], key: str, expected: object, where: str, log: Log) -> None:
    found = value.get(key, "no such key")
    log.looked_at("config")
    # 1 == True in Python, and a JSON true where a number belongs is wrong.
    if found != expected or type(found) is not type(expected):
        log.differs("config", file=CONFIG, expected=f"{where}{key}: {expected!r}", found=repr(found))


def _check_top(quantization: Mapping[str, Any], groups: Sequence[_Group], log: Log) -> None:
    where = "quantization_config."
    _unknown(quantization, TOP_FIELDS, "quantization_config", log)
    _must_be(quantization, "quant_method", "compressed-tensors", where, log)
    _must_be(quantization, "quantization_status", "compressed", where, log)
    formats = {group.scheme.format for group in groups if group.scheme}
    if formats and all(group.scheme for group in groups):
        _must_be(quantization, "format", "mixed-precision" if len(formats) > 1 else formats.pop(), where, log)
    if not isinstance(quantization.get("version"), str):
        log.differs(
            "config", file=CONFIG, expected=f"{where}version: a string", found=repr(quantization.get("version"))
        )
    for key in ("kv_cache_scheme", "global_compression_ratio", "sparsity_config", "transform_config"):
        if quantization.get(key):
            log.differs("config", file=CONFIG, expected=f"{where}{key}: null", found=repr(quantization[key])[:80])


def _groups(quantization: Mapping[str, Any], log: Log) -> list[_Group]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        log.differs("config", file=CONFIG, expected="config_groups: an object with groups", found=repr(groups)[:80])
        return []
    made = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict):
            log.differs("config", file=CONFIG, expected=f"{where}: an object", found=type(group).__name__)
            continue
        _unknown(group, GROUP_FIELDS, where, log)
        targets = _Patterns(_strings(group.get("targets"), f"{where}.targets", log), f"{where}.targets", log)
        made.append(_Group(name, targets, _scheme(name, group, where, log)))
    return made


def _scheme(name: str, group: Mapping[str, Any], where: str, log: Log) -> Scheme | None:
    kind = group.get("format")
    if kind not in (*_WEIGHTS, *_GENERAL):
        formats = ", ".join((*_WEIGHTS, *_GENERAL))
        log.differs("config", file=CONFIG, expected=f"{where}.format: one of {formats}", found=repr(kind))
        return None
    weights = _arguments(group.get("weights"), f"{where}.weights", log)
    if weights is None:
        return None
    if group.get("output_activations") is not None:
        log.differs("config", file=CONFIG, expected=f"{where}.output_activations: null", found="something else")
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
    return Scheme(name, kind, bits if isinstance(bits, int) else 0, weights.get("group_size"), inputs is not None)


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
) -> Scheme | None:
    """A scheme that compressed-tensors knows; a difference, and None, where it does not."""
    from dsv4q.verify.library import Refused, library_scheme

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
        log.differs("config", file=CONFIG, expected=expected, found=error)
    return None


def _arguments(value: object, where: str, log: Log) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        log.differs(
            "config", file=CONFIG, expected=f"{where}: an object", found="null" if value is None else repr(value)
        )
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
        log.differs("config", file=CONFIG, expected=f"{where}observer: null or a stock one", found=repr(observer))
    if not isinstance(arguments.get("observer_kwargs", {}), dict):
        log.differs("config", file=CONFIG, expected=f"{where}observer_kwargs: an object", found="something else")
    allowed = _SCALE_DTYPES.get(kind, frozenset({None}))
    if not any_scale_dtype and arguments.get("scale_dtype") not in allowed:
        found = repr(arguments["scale_dtype"])
        log.differs(
            "config", file=CONFIG, expected=f"{where}scale_dtype: one of {sorted(map(str, allowed))}", found=found
        )


# ------------------------------------------------------------------------------------------------ targets and ignore


class _Simulation:
    """Asks of every linear, under every name that it may bear, what the consumer would do with it."""

    def __init__(self, dims: Dims, groups: Sequence[_Group], ignore: _Patterns, log: Log) -> None:
        self.dims, self.groups, self.ignore, self.log = dims, groups, ignore, log
        self.found: dict[tuple[str, str], list[str]] = defaultdict(list)
        """(expected, found) -> names concerned: one defect of one entry is one difference, with its count."""
        self.effective: dict[str, str | None] = {}
        """Main linear that may be quantized -> group that quantizes it in the consumer."""
        self.schemes: dict[str, Scheme] = {}
        self.names: list[str] = []

    def run(self, specs: Sequence[TensorSpec]) -> dict[str, Scheme]:
        for spec in specs:
            if not spec.name.endswith(".weight"):
                continue
            names = self._names(spec)
            self.names += names
            self.log.looked_at("targets", len(names))
            if spec.is_quantizable:
                self._quantizable(spec, names)
            else:
                self._untouched(spec, names)
        self._idle_targets()
        self._fused(specs)
        for (expected, found), concerned in self.found.items():
            self.log.differs("targets", file=CONFIG, expected=expected, found=f"{found}: {few(concerned)}")
        return self.schemes

    def _names(self, spec: TensorSpec) -> tuple[str, ...]:
        upstream, transformers = spec.module, spec.hf_name.removesuffix(".weight")
        if not spec.is_mtp:
            return upstream, f"model.{upstream}", transformers
        draft = f"model.layers.{self.dims.layers + int(spec.block.removeprefix('mtp.'))}"
        tail, hf_tail = (name.removeprefix(f"{spec.block}.") for name in (upstream, transformers))
        tails = dict.fromkeys((tail, hf_tail))
        prefixes = (spec.block, f"model.{spec.block}", draft, f"{draft}.mtp_block")
        return tuple(f"{prefix}.{one}" for prefix in prefixes for one in tails)

    def _hits(self, name: str) -> list[_Group]:
        return [group for group in self.groups if group.targets.match(name)]

    def _quantizable(self, spec: TensorSpec, names: Sequence[str]) -> None:
        hits = [self._hits(name) for name in names]
        first: list[_Group] = next((hit for hit in hits if hit), [])
        for name, hit in zip(names, hits, strict=True):
            if len(hit) > 1:
                self._note("one group per linear", " and ".join(group.name for group in hit), name)
            if not hit and first:
                found = f"{first[0].name} does not match"
                self._note("targets that match in both vocabularies", found, name)
            entry = self.ignore.match(name) if first else None
            if entry is not None:
                self._note("no ignore entry that matches a targeted linear", entry, name)
        ignored = any(self.ignore.match(name) for name in names) if first else False
        self.effective[spec.module] = first[0].name if first and not ignored else None
        scheme = first[0].scheme if first else None
        if scheme is not None and self._fits(scheme, spec):
            self.schemes[spec.module] = scheme

    def _fits(self, scheme: Scheme, spec: TensorSpec) -> bool:
        """Whether a linear of this shape can be stored."""
        if not scheme.is_general:
            columns = scheme.columns
            ragged = isinstance(columns, int) and columns > 0 and spec.shape[1] % columns != 0
            if ragged:
                expected = f"linears that {scheme.group} can store"
                self._note(expected, f"{spec.shape[1]} columns in groups of {columns}", spec.module)
            return not ragged
        from dsv4q.verify.library import Refused

        try:
            scheme.stored(spec.shape)
        except Refused as error:
            self._note(f"linears that {scheme.group} can store", str(error), spec.module)
            return False
        return True

    def _untouched(self, spec: TensorSpec, names: Sequence[str]) -> None:
        for name in names:
            hit = self._hits(name)
            if hit and self.ignore.match(name) is None:
                what = "the MTP draft" if spec.is_mtp else f"{spec.role}s"
                self._note(f"{what} left unquantized under every name", f"{hit[0].name} quantizes", name)

    def _note(self, expected: str, found: str, name: str) -> None:
        self.found[expected, found].append(name)

    def _idle_targets(self) -> None:
        for group in self.groups:
            for entry in group.targets.idle(self.names):
                self.log.differs(
                    "targets",
                    file=CONFIG,
                    expected=f"config_groups.{group.name}: targets that match something",
                    found=entry,
                )

    def _fused(self, specs: Sequence[TensorSpec]) -> None:
        """Per layer: five projections or none, one group for all experts; fused linears never apart."""
        layers: dict[tuple[str, str], list[str]] = defaultdict(list)
        for spec in specs:
            if spec.is_quantizable:
                layers[spec.block, spec.role].append(spec.module)
        for (block, role), modules in layers.items():
            self.log.looked_at("targets")
            bare = [module for module in modules if self.effective[module] is None]
            if bare and len(bare) < len(modules):
                self.found[f"all {role}s of a layer quantized, or none", "not quantized"] += bare
            mixed = {self.effective[module] for module in modules} - {None}
            if role == Role.ROUTED_EXPERT and len(mixed) > 1:
                self._note("one group for all experts of a layer", " and ".join(sorted(map(str, mixed))), block)
            if role == Role.ATTENTION:
                wq_a, wkv = f"{block}.attn.wq_a", f"{block}.attn.wkv"
                if self.effective[wq_a] != self.effective[wkv]:
                    found = f"{self.effective[wq_a]} and {self.effective[wkv]}"
                    self._note("wq_a and wkv of a layer, which the consumer fuses, in one group", found, block)
        self._expert_pairs(layers)

    def _expert_pairs(self, layers: Mapping[tuple[str, str], list[str]]) -> None:
        for (_, role), modules in layers.items():
            for w1 in (m for m in modules if role == Role.ROUTED_EXPERT and m.endswith(".w1")):
                w3 = f"{w1.removesuffix('.w1')}.w3"
                if self.effective[w1] != self.effective[w3]:
                    found = f"{self.effective[w1]} and {self.effective[w3]}"
                    self._note("w1 and w3 of an expert, which the consumer fuses, in one group", found, w1)
