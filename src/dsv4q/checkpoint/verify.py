"""The independent judge of an artifact: `dsv4q verify-shards`.

It derives by itself what must be there: the tensors of a DeepSeek-V4 from config.json (`layout`), how each linear is stored
from config.json's quantization_config (`verify_config`), and it reads index and headers with its own eyes, so that every
difference is counted once and exactly. It shares nothing with planner and writer. Exact sets, never thresholds: the consumer
loads an artifact with a missing expert, a missing scale or a scale of the wrong dtype in silence.

`verify_headers` reads no tensor and imports no torch. `verify` adds the values (`verify_values`).
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.layout import (
    DTYPE_BYTES,
    HEAD_COPIES,
    Dims,
    Shape,
    TensorSpec,
    load_config,
    source_tensors,
)
from dsv4q.checkpoint.verify_config import FP8, Scheme, judge_config
from dsv4q.checkpoint.verify_result import Difference, ErrorStats, Log, VerifyResult, few
from dsv4q.errors import SourceError

__all__ = ["Difference", "ErrorStats", "Headers", "Survey", "VerifyResult", "verify", "verify_headers"]

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Longest header that safetensors accepts, in bytes."""
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

Progress = Callable[[str, int, int], None]
"""Called with a label, bytes done, bytes in all."""


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor as a shard's header describes it."""

    file: str
    dtype: str
    shape: Shape
    start: int
    """Of the data, from the beginning of the file."""
    nbytes: int

    def text(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Headers:
    """All that lies in an artifact's shards."""

    holders: dict[str, list[Header]]
    """Tensor name -> where it lies; more than one place is a difference."""
    unread: frozenset[str]
    """Shards that could not be read."""
    index: dict[str, str]
    """Tensor name -> shard file, as the index says; empty without a usable index."""
    shards: int

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for headers in self.holders.values() for header in headers)


@dataclass(frozen=True)
class Survey:
    """What the header checks learned; the value checks start from it."""

    root: Path
    config: Mapping[str, Any]
    dims: Dims
    specs: Mapping[str, TensorSpec]
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
    """Judge an artifact.

    Args:
        artifact: its folder.
        source: the checkpoint it was made of; compares untouched tensors byte by byte, re-encodes quantized ones.
        deep: look at every value: scales finite and positive, pairs equal, no NaN.
        progress: called with a label, bytes done and bytes in all.
        device: where quantized weights are encoded and compared.

    Raises:
        SourceError: artifact or source has no config.json, or not one of a DeepSeek-V4; reading fails.
    """
    begin = time.monotonic()
    log = Log()
    survey, headers = _survey(artifact, log)
    errors: dict[str, ErrorStats] = {}
    if deep or source is not None:
        from dsv4q.checkpoint.verify_values import judge_values

        errors = judge_values(survey, source, deep, progress, device, log)
    return VerifyResult(
        artifact=str(artifact),
        tensors=len(headers.holders),
        shards=headers.shards,
        bytes=headers.nbytes,
        mtp_tensors=sum(name.startswith("mtp.") for name in headers.holders),
        checks=dict(log.checks),
        differences=tuple(log.differences),
        errors=errors,
        seconds=time.monotonic() - begin,
    )


def _survey(artifact: Path, log: Log) -> tuple[Survey, Headers]:
    if not artifact.is_dir():
        raise SourceError("There is no artifact folder here", where=artifact, hint="give the folder with config.json")
    config = load_config(artifact)
    dims = Dims.from_config(config, artifact / "config.json")
    specs = source_tensors(dims)
    headers = _read_shards(artifact, log)
    _check_files(artifact, headers, log)
    _check_index(headers, artifact, log)
    schemes = judge_config(config, dims, specs, log)
    copies = _head_copies(dims, headers)
    expected = _expected(specs, schemes, copies)
    sound = _check_tensors(expected, specs, headers, log)
    _check_attention_scales(sound, schemes, log)
    return Survey(artifact, config, dims, {spec.name: spec for spec in specs}, schemes, copies, sound), headers


# ------------------------------------------------------------------------------------------------ files


def _check_files(root: Path, headers: Headers, log: Log) -> None:
    """The files that must be there, readable by others, and no remains of an unfinished run."""
    required = ["config.json", INDEX, "recipe.yaml", *sorted(set(headers.index.values()))]
    for name in required:
        log.looked_at("files")
        try:
            mode = (root / name).stat().st_mode
        except (OSError, ValueError):
            if not (name.endswith(".safetensors") and name in headers.unread):
                log.differs("files", file=name, expected="a file of this name", found="none")
            continue
        if not stat.S_ISREG(mode):
            log.differs("files", file=name, expected="a regular file", found=stat.filemode(mode))
        elif mode & 0o444 != 0o444:
            found = f"{stat.S_IMODE(mode):04o}"
            log.differs("files", file=name, expected="a file that everybody may read (0644)", found=found)
    for path in sorted(root.iterdir()):
        if path.name.endswith((".partial", ".tmp")) or path.name == ".dsv4q":
            log.differs("files", file=path.name, expected="no remains of an unfinished run", found=path.name)


def _check_names(files: Sequence[str], log: Log) -> None:
    """`model-00001-of-000NN.safetensors`, complete from 1 to N."""
    matches = {file: _SHARD.fullmatch(file) for file in files}
    for file, match in matches.items():
        if match is None:
            log.differs("index", file=file, expected="model-00001-of-000NN.safetensors", found=file)
    totals = Counter(int(match[2]) for match in matches.values() if match)
    if not totals:
        log.differs("index", file=INDEX, expected="shards model-00001-of-000NN.safetensors", found="none")
        return
    total = totals.most_common(1)[0][0]
    for number in range(1, total + 1):
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        if name not in matches:
            log.differs("index", file=name, expected=f"all {total} shards", found="this one is missing")
    for file, match in matches.items():
        if match and (int(match[2]) != total or not 1 <= int(match[1]) <= total):
            log.differs("index", file=file, expected=f"shards 1 to {total} of {total}", found=file)


# ------------------------------------------------------------------------------------------------ headers


def _read_shards(root: Path, log: Log) -> Headers:
    """Every shard that lies in the folder or that the index names."""
    index = _read_index(root, log)
    on_disk = {path.name for path in root.iterdir() if path.name.endswith(".safetensors")}
    named = set(index.values())
    for file in sorted(named):
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            log.differs("index", file=INDEX, expected="names of shards in this folder", found=ascii(file)[:120])
    holders: dict[str, list[Header]] = defaultdict(list)
    unread = set(named - on_disk)
    files = sorted(on_disk)
    _check_names(files, log)
    for file in files:
        log.looked_at("headers")
        entries = _read_header(root, file, log)
        if entries is None:
            unread.add(file)
            continue
        for name, header in entries.items():
            holders[name].append(header)
    return Headers(dict(holders), frozenset(unread), index, len(files))


def _read_index(root: Path, log: Log) -> dict[str, str]:
    path = root / INDEX
    if not path.is_file():
        return {}  # the file check says so
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        log.differs("index", file=INDEX, expected="a JSON object", found=error)
        return {}
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        log.differs("index", file=INDEX, expected="weight_map: tensor name -> file name", found=repr(weight_map)[:80])
        return {}
    return weight_map


def _read_header(root: Path, file: str, log: Log) -> dict[str, Header] | None:
    """Tensors of one shard; None when the header says nothing usable. The data itself is not read.

    safetensors: u64 little-endian header length, JSON header, data; tensors tile the data without hole or overlap.
    """

    def bad(expected: str, found: object, tensor: str | None = None) -> None:
        log.differs("headers", tensor=tensor, file=file, expected=expected, found=str(found)[:120])

    path = root / file
    try:
        if not path.is_file():
            bad("a regular file", "something else")
            return None
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                bad(f"a header length that fits {size:,} bytes", f"{length:,}")
                return None
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        bad("a header that can be read", error)
        return None
    if not isinstance(header, dict):
        bad("a JSON object as header", type(header).__name__)
        return None
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        entry = _entry(file, info, 8 + length)
        if entry is None:
            bad("dtype, shape and data_offsets that agree", repr(info), ascii(name)[1:-1])
        else:
            entries[name] = entry
    _check_tiling(entries, 8 + length, size, bad)
    return entries


def _entry(file: str, info: object, base: int) -> Header | None:
    if not isinstance(info, dict):
        return None
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not (isinstance(dtype, str) and dtype in DTYPE_BYTES and _naturals(shape) and _naturals(offsets)):
        return None
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        return None
    return Header(file, dtype, tuple(shape), base + offsets[0], offsets[1] - offsets[0])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(entries: Mapping[str, Header], base: int, size: int, bad: Callable[..., None]) -> None:
    end = base
    for name, header in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if header.start != end:
            bad(f"data at offset {end:,}, where the tensor before it ends", f"{header.start:,}", name)
        end = max(end, header.start + header.nbytes)
    if size != end:
        bad(f"{end:,} bytes, as its header says", f"{size:,} bytes")


def _check_index(headers: Headers, root: Path, log: Log) -> None:
    """Index and headers agree in both directions; total_size is the exact sum."""
    if not headers.index:
        return
    for name, file in headers.index.items():
        log.looked_at("index")
        holders = headers.holders.get(name, [])
        if file not in headers.unread and file not in [holder.file for holder in holders]:
            found = f"in {few([holder.file for holder in holders])}" if holders else "in no shard"
            log.differs("index", tensor=name, file=file, expected="the tensor in the shard that the index names", found=found)
        elif file in headers.unread and not (root / file).exists():
            log.looked_at("index")
    for name, holders in headers.holders.items():
        if name not in headers.index:
            log.differs("index", tensor=name, file=holders[0].file, expected="an entry in the index", found="none")
        if len(holders) > 1:
            log.differs("index", tensor=name, file=holders[1].file, expected="one copy", found=f"also in {holders[0].file}")
    metadata = json.loads((root / INDEX).read_bytes()).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not headers.unread and (type(total) is not int or total != headers.nbytes):
        log.differs("index", file=INDEX, expected=f"total_size {headers.nbytes}", found=repr(total))


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


def _check_tensors(
    expected: Expected, specs: Sequence[TensorSpec], headers: Headers, log: Log
) -> dict[str, Header]:
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
        elif len(holders) == 1:
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
