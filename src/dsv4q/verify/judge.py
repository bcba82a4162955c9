"""The independent judge of an artifact, or of a plain BF16 checkpoint: `dsv4q verify-shards`.

It derives by itself what must be there: the tensors of a DeepSeek-V4 from config.json (`layout`), how each linear is
stored from config.json's quantization_config (`config.py`), and it reads index and headers with its own eyes
(`files.py`), so that every difference is counted once and exactly. It shares nothing with planner and writer. Exact
sets, never thresholds: the consumer loads an artifact with a missing expert, a missing scale or a scale of the wrong
dtype in silence.

A checkpoint without quantization_config is plain: every tensor of the layout in the layout's dtype, no recipe.yaml.

`verify_headers` reads no tensor and imports no torch. `verify` adds the values (`values.py`).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.folder import load_model_config
from dsv4q.errors import SourceError
from dsv4q.layout import HEAD_COPIES, Dims, Shape, TensorSpec, source_tensors
from dsv4q.verify.config import FP8, Scheme, judge_config
from dsv4q.verify.files import Header, Headers, check_files, check_index, read_shards
from dsv4q.verify.result import Difference, ErrorStats, Log, VerifyResult

__all__ = ["Difference", "ErrorStats", "Survey", "VerifyResult", "verify", "verify_headers"]

_COMPRESSED = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")

Progress = Callable[[str, int, int], None]
"""Called with a label, bytes done, bytes in all."""


@dataclass(frozen=True)
class Survey:
    """What the header checks learned; the value checks start from it."""

    root: Path
    config: Mapping[str, Any]
    dims: Dims
    specs: Mapping[str, TensorSpec]
    plain: bool
    """Nothing is quantized, and nothing is meant to be."""
    schemes: Mapping[str, Scheme]
    copies: Mapping[str, str]
    """Head copies that are there -> the main tensor that each copies."""
    sound: Mapping[str, Header]
    """Tensors that must be there and are, once, with the right dtype and shape."""


def verify_headers(artifact: Path) -> VerifyResult:
    """Judge names, dtypes, shapes, index, config.json and files. Reads no tensor.

    Raises:
        SourceError: no config.json, or not one of a DeepSeek-V4.
    """
    return verify(artifact, source=None, deep=False, progress=None)


def verify(
    artifact: Path, *, source: Path | None, deep: bool, progress: Progress | None, device: str = "cpu"
) -> VerifyResult:
    """Judge an artifact or a plain checkpoint.

    Args:
        artifact: its folder.
        source: the checkpoint it was made of, BF16 or native; compares untouched tensors byte by byte, re-encodes
            quantized ones.
        deep: look at every value: scales finite and positive, pairs equal, no NaN.
        progress: called with a label, bytes done and bytes in all.
        device: where quantized weights are encoded and compared: auto, cpu, cuda or cuda:N.

    Raises:
        DeviceError: no such device.
        WeightError: a native source has values that are not numbers.
        SourceError: artifact or source has no config.json, or not one of a DeepSeek-V4; reading fails.
    """
    begin = time.monotonic()
    log = Log()
    survey, headers = _survey(artifact, log)
    errors: dict[str, ErrorStats] = {}
    if deep or source is not None:
        from dsv4q.verify.values import judge_values

        errors = judge_values(survey, source, deep, progress, device, log)
    return VerifyResult(
        artifact=str(artifact),
        kind="plain" if survey.plain else "quantized",
        tensors=len(headers.holders),
        shards=headers.shards,
        bytes=headers.nbytes,
        mtp_tensors=sum(name.startswith("mtp.") for name in headers.holders),
        checks=dict(log.checks),
        differences=tuple(log.differences),
        errors={role: stats.as_dict() for role, stats in errors.items()},
        seconds=time.monotonic() - begin,
    )


def _survey(artifact: Path, log: Log) -> tuple[Survey, Headers]:
    if not artifact.is_dir():
        raise SourceError("There is no artifact folder here", where=artifact, hint="give the folder with config.json")
    config = load_model_config(artifact)
    dims = Dims.from_config(config, artifact / "config.json")
    specs = source_tensors(dims)
    headers = read_shards(artifact, log)
    plain = _is_plain(config, headers)
    check_files(artifact, headers, not plain, log)
    check_index(headers, log)
    schemes = {} if plain else judge_config(config, dims, specs, log)
    copies = {} if plain else _head_copies(dims, headers)
    expected = _expected(specs, schemes, copies)
    sound = _check_tensors(expected, specs, headers, log)
    _check_attention_scales(sound, schemes, log)
    by_name = {spec.name: spec for spec in specs}
    return Survey(artifact, config, dims, by_name, plain, schemes, copies, sound), headers


def _is_plain(config: Mapping[str, Any], headers: Headers) -> bool:
    """No quantization_config, and no tensor that only an artifact has: one that lost its config must not pass."""
    names = headers.holders.keys() | headers.index.keys()
    return config.get("quantization_config") is None and not any(name.endswith(_COMPRESSED) for name in names)


# ------------------------------------------------------------------------------------------------ tensors

Expected = dict[str, tuple[tuple[str, ...], Shape]]
"""Tensor name -> dtypes allowed, shape."""


def _head_copies(dims: Dims, headers: Headers) -> dict[str, str]:
    """Copies of the shared head under every MTP layer: all of them as soon as one is there."""
    copies = {f"mtp.{i}.{suffix}": main for i in range(dims.mtp_layers) for suffix, main in HEAD_COPIES.items()}
    known = headers.holders.keys() | headers.index.keys()
    return copies if copies.keys() & known else {}


def _expected(specs: Sequence[TensorSpec], schemes: Mapping[str, Scheme], copies: Mapping[str, str]) -> Expected:
    expected: Expected = {}
    for spec in specs:
        scheme = schemes.get(spec.module) if spec.is_quantizable else None
        if scheme is None:
            expected[spec.name] = ((spec.dtype,), spec.shape)
            continue
        for suffix, stored in scheme.stored(spec.shape).items():
            expected[f"{spec.module}.{suffix}"] = stored
    return expected | {copy: expected[main] for copy, main in copies.items()}


def _check_tensors(expected: Expected, specs: Sequence[TensorSpec], headers: Headers, log: Log) -> dict[str, Header]:
    """The exact set, each with its exact dtype and shape. Returns the tensors that are as they must be."""
    sound = {}
    for name, (dtypes, shape) in expected.items():
        check = "mtp" if name.startswith("mtp.") else "tensors"
        log.looked_at(check)
        holders = headers.holders.get(name)
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        if holders is None:
            # Of an unreadable shard nobody knows what is in it; that it is unreadable has been said.
            file = headers.index.get(name)
            if file is None or file not in headers.unread:
                log.differs(check, tensor=name, file=file, expected=wanted, found="no such tensor")
        elif holders[0].dtype not in dtypes or holders[0].shape != shape:
            log.differs(check, tensor=name, file=holders[0].file, expected=wanted, found=holders[0].text())
        elif len(holders) == 1 and holders[0].whole:
            sound[name] = holders[0]
    _check_extra(expected, specs, headers, log)
    return sound


def _check_extra(expected: Expected, specs: Sequence[TensorSpec], headers: Headers, log: Log) -> None:
    extra = [name for name in headers.holders if name not in expected]
    if not extra:
        return
    transformers = {spec.hf_name: spec.name for spec in specs if spec.hf_name != spec.name}
    modules = {spec.hf_name.rpartition(".")[0]: spec.module for spec in specs if spec.hf_name != spec.name}
    draft = any(spec.is_mtp for spec in specs)
    for name in extra:
        check = "mtp" if name.startswith("mtp.") else "tensors"
        header = headers.holders[name][0]
        wanted = _instead(name, transformers, modules, draft)
        log.differs(check, tensor=name, file=header.file, expected=wanted, found=header.text())


def _instead(name: str, transformers: Mapping[str, str], modules: Mapping[str, str], draft: bool) -> str:
    """What should be there instead of a tensor that should not."""
    module, _, suffix = name.rpartition(".")
    if name in transformers:
        return f"{transformers[name]}: this is transformers' name of it"
    if module in modules:
        return f"{modules[module]}.{suffix}: this is transformers' name of it"
    if name.startswith("mtp.") and not draft:
        return "no mtp.* tensor: num_nextn_predict_layers is 0"
    if re.fullmatch(r"mtp\.\d+\.embed\.weight", name):
        return f"no such name (it breaks the consumer's loader); the copy is {name.replace('embed', 'emb.tok_emb')}"
    if name.endswith((".weight_scale_inv", ".scale")):
        return f"no such name; a scale is called {module}.weight_scale"
    return "no such tensor"


def _check_attention_scales(sound: Mapping[str, Header], schemes: Mapping[str, Scheme], log: Log) -> None:
    """BF16 or F32, but the same everywhere."""
    names = [f"{module}.weight_scale" for module, scheme in schemes.items() if scheme.format == FP8]
    dtypes = Counter(sound[name].dtype for name in names if name in sound)
    if len(dtypes) < 2:
        return
    usual = dtypes.most_common(1)[0][0]
    for name in names:
        if name in sound and sound[name].dtype != usual:
            expected = f"{usual}, as the other attention scales"
            log.differs("tensors", tensor=name, file=sound[name].file, expected=expected, found=sound[name].dtype)
