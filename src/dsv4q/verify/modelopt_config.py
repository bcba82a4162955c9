"""config.json and hf_quant_config.json of an artifact in ModelOpt's layout, judged alone.

vLLM 0.33.0 builds the model by `quant_method: "fp8"` and the release's own keys, the routed experts by `moe_quant_algo`
unless a glob of `ignore` covers them. It matches globs with `fnmatch` against `layers.N.ffn.experts` and
`mtp.k.ffn.experts` only, so an entry that begins with `re:` does nothing. SGLang 0.5.23 wants `quant_algo`,
`moe_quant_algo` and `group_size`; TensorRT-LLM reads hf_quant_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from dsv4q.layout import Dims, source_tensors
from dsv4q.verify.result import Log

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"

_RELEASE: Mapping[str, Any] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
"""What the release says of its FP8 linears, which are still there."""
_OURS: Mapping[str, Any] = {
    "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None,
}  # fmt: skip
_LAYER = {"quant_algo": "NVFP4", "group_size": 16}


def judge_modelopt_config(
    config: Mapping[str, Any], dims: Dims, drafted: frozenset[str], files: Mapping[str, Any], log: Log
) -> None:
    """Check every key that a consumer reads.

    Args:
        drafted: blocks of the draft whose experts the files hold as NVFP4.
        files: hf_quant_config.json parsed, or None where there is none that can be.
    """
    _must_be(config, "expert_dtype", "fp4", "", log)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        log.differs("config", file=CONFIG, expected="quantization_config: an object", found=type(quantization).__name__)
        return
    for key, value in {**_RELEASE, **_OURS}.items():
        _must_be(quantization, key, value, "quantization_config.", log)
    if quantization.get("ignored_layers"):
        found = repr(quantization["ignored_layers"])[:80]
        expected = "quantization_config.ignored_layers: none, all linears are FP8 as in the release"
        log.differs("config", file=CONFIG, expected=expected, found=found)
    ignore = quantization.get("ignore")
    if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
        log.differs(
            "config", file=CONFIG, expected="quantization_config.ignore: a list of globs", found=repr(ignore)[:80]
        )
        ignore = []
    _judge_ignore(ignore, dims, drafted, log)
    _judge_layers(quantization.get("quantized_layers"), dims, log)
    _judge_beside(quantization, files.get(HF_QUANT_CONFIG), log)


def _must_be(value: Mapping[str, Any], key: str, expected: object, where: str, log: Log) -> None:
    log.looked_at("config")
    found = value.get(key, "no such key")
    # 16.0 and True equal integers in Python, and are none in JSON.
    if found != expected or type(found) is not type(expected):
        log.differs("config", file=CONFIG, expected=f"{where}{key}: {expected!r}", found=repr(found)[:80])


def _judge_ignore(ignore: Sequence[str], dims: Dims, drafted: frozenset[str], log: Log) -> None:
    """A main layer's experts must not be covered, a draft's exactly if they are stored as in the release."""

    def covering(name: str) -> str | None:
        log.looked_at("targets")
        return next((entry for entry in ignore if fnmatchcase(name, entry)), None)

    def wrong(expected: str, found: str) -> None:
        log.differs("targets", file=CONFIG, expected=expected, found=found)

    for pattern in (entry for entry in ignore if entry.startswith("re:")):
        wrong("quantization_config.ignore: globs, for a regular expression matches nothing here", pattern)
    for name in (f"layers.{layer}.ffn.experts" for layer in range(dims.layers)):
        entry = covering(name)
        if entry is not None:
            wrong(f"no glob of quantization_config.ignore that covers {name}, which are NVFP4", entry)
    for block in dict.fromkeys(spec.block for spec in source_tensors(dims) if spec.is_mtp):
        name = f"{block}.ffn.experts"
        entry = covering(name)
        if block not in drafted and entry is None:
            expected = f"a glob of quantization_config.ignore that covers {name}, which are MXFP4 as in the release"
            wrong(expected, "none, so the consumer builds them as NVFP4 and loads garbage in silence")
        if block in drafted and entry is not None:
            wrong(f"no glob of quantization_config.ignore that covers {name}, which are NVFP4", entry)


def _judge_layers(layers: object, dims: Dims, log: Log) -> None:
    if not isinstance(layers, dict):
        expected = "quantization_config.quantized_layers: an object"
        log.differs("config", file=CONFIG, expected=expected, found=type(layers).__name__)
        return
    wanted = {f"layers.{layer}.ffn.experts": _LAYER for layer in range(dims.layers)}
    for name in [*wanted, *(name for name in layers if name not in wanted)]:
        log.looked_at("config")
        if layers.get(name) != wanted.get(name) and not (name.startswith("mtp.") and layers.get(name) == _LAYER):
            expected = f"quantization_config.quantized_layers.{name}: {wanted.get(name, 'no such entry')}"
            log.differs("config", file=CONFIG, expected=expected, found=repr(layers.get(name, "no such entry"))[:80])


def _judge_beside(quantization: Mapping[str, Any], beside: Any, log: Log) -> None:
    """hf_quant_config.json says the same in other words."""
    log.looked_at("config")
    said = beside.get("quantization") if isinstance(beside, dict) else None
    if not isinstance(said, dict):
        expected = "an object with `quantization`, which TensorRT-LLM reads"
        log.differs("config", file=HF_QUANT_CONFIG, expected=expected, found=type(beside).__name__)
        return
    pairs = {key: key for key in ("quant_algo", "kv_cache_quant_algo", "group_size", "quantized_layers")}
    for key, theirs in {**pairs, "exclude_modules": "ignore"}.items():
        log.looked_at("config")
        if said.get(key) != quantization.get(theirs):
            expected = f"quantization.{key}: that of config.json's {theirs}, {quantization.get(theirs)!r}"[:200]
            log.differs("config", file=HF_QUANT_CONFIG, expected=expected, found=repr(said.get(key))[:80])
