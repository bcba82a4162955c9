"""What decides whether an engine loads a checkpoint: a few words, from config.json and the headers alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.against_layout import draft_kind
from dsv4q.checkpoint.native import scan_source
from dsv4q.checkpoint.output import require_finished
from dsv4q.checkpoint.source import require_weights
from dsv4q.errors import SourceError, command, first_problem
from dsv4q.foreign.modelopt import COMPRESSED, MODELOPT, layout_of
from dsv4q.layout import ATTENTION_PROJECTIONS, DSPARK, HEAD_COPIES, NO_DRAFT, Dims, known_release

NATIVE, BF16 = "native", "bf16"
"""Layouts besides those of an artifact."""
NONE, OTHER = "none", "other"
MTP_TOKENS = 2
"""Proposed at a time with MTP; with DSpark it is dspark_block_size."""

_MAIN_EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.\d+\.w[123]")
_DRAFT_EXPERT = re.compile(r"mtp\.\d+\.ffn\.experts\.\d+\.w[123]")
_DRAFT_LINEAR = re.compile(r"mtp\.\d+\.ffn\.shared_experts\.w[123]")
_ATTENTION = re.compile(rf"layers\.\d+\.attn\.({'|'.join(ATTENTION_PROJECTIONS)})")


@dataclass(frozen=True)
class Facts:
    """What the rules of compat.yaml ask for."""

    layout: str
    """`compressed-tensors`, `modelopt`, `native` or `bf16`."""
    experts: str
    """Form of the main layers' routed experts: `nvfp4`, `nvfp4-weight-only`, `int`, `mxfp4`, `fp8`, `bf16`, `other`."""
    attention: str
    """Form of their attention projections."""
    draft: str
    """Kind of draft that the files hold: `none`, `mtp`, `dspark`, or `unknown`."""
    draft_experts: str
    """Form of its routed experts."""
    draft_linears: str
    """Form of its shared experts, whose like its other linears are."""
    head_copies: bool
    """Whether it has copies of the shared head."""
    draft_ignored: bool
    """Whether globs of `ignore` cover the draft's experts, as ModelOpt's layout has it."""
    expert_dtype: str
    """As in config.json; `fp4` where it is not, as vLLM has it."""
    quant_method: str
    quant_algo: str
    moe_quant_algo: str
    """As in quantization_config, in small letters; `none` where they are not."""
    release: str | None
    """The release of these dimensions, if it is known."""
    tokens: int
    """That the draft proposes at a time."""
    nbytes: int
    """Of all tensors."""
    widths: Mapping[str, int]
    """Numbers of config.json, by its keys."""

    @property
    def gpus(self) -> tuple[int, int]:
        """How many GPUs of how many GB hold the weights, and the cache beside them."""
        if self.nbytes < 60e9:
            return 1, 80
        return (4, 80) if self.nbytes < 260e9 else (8, 180)


def facts_of(config: Mapping[str, Any], dtypes: Mapping[str, str], nbytes: int, where: str | Path) -> Facts:
    """The facts of a checkpoint.

    Args:
        config: its config.json.
        dtypes: name of each tensor in the files -> dtype.
        nbytes: of all tensors.
        where: names config.json in errors.

    Raises:
        SourceError: config.json describes no DeepSeek-V4, or the files are in no layout that the table knows.
    """
    dims = Dims.from_config(config, where)
    parts: dict[re.Pattern[str], dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, dtype in dtypes.items():
        module, _, suffix = name.rpartition(".")
        is_expert = ".experts." in name
        if name.startswith("mtp."):
            pattern = _DRAFT_EXPERT if is_expert else _DRAFT_LINEAR
        else:
            pattern = _MAIN_EXPERT if is_expert else _ATTENTION
        if module in parts[pattern] or pattern.fullmatch(module):
            parts[pattern][module][suffix] = dtype
    experts, drafted, attention = (_form(parts[p]) for p in (_MAIN_EXPERT, _DRAFT_EXPERT, _ATTENTION))
    quantization = config.get("quantization_config")
    stated: Mapping[str, Any] = quantization if isinstance(quantization, dict) else {}
    method, algorithm, moe_algorithm = (
        str(stated.get(key) or NONE).lower() for key in ("quant_method", "quant_algo", "moe_quant_algo")
    )
    layout = layout_of(config)
    if layout is None:
        layout = {"mxfp4": NATIVE, "fp8": NATIVE, "bf16": BF16}.get(experts)
    if layout is None or (method not in (COMPRESSED, "fp8", NONE) and layout != MODELOPT):
        raise SourceError(
            "This checkpoint is in no layout of which it is known which engine loads it",
            where=where,
            expected="compressed-tensors, ModelOpt, DeepSeek's own FP8 and MXFP4, or BF16, in DeepSeek's own names",
            found=f"quant_method {method}, routed experts {experts}",
            hint="`dsv4q verify-shards` says what differs",
        )
    kind = draft_kind(dtypes)
    copies = tuple(f".{suffix}" for suffix in HEAD_COPIES)
    blocks = {name.split(".ffn.")[0] for name in dtypes if name.startswith("mtp.") and ".ffn.experts." in name}
    ignore = stated.get("ignore")
    globs = [entry for entry in ignore if isinstance(entry, str)] if isinstance(ignore, list) else []
    expert_dtype = str(config.get("expert_dtype") or "fp4")
    release = known_release(dims, expert_dtype)
    return Facts(
        layout=layout,
        experts=experts,
        attention=attention,
        draft=kind,
        draft_experts=drafted,
        draft_linears=_form(parts[_DRAFT_LINEAR]),
        head_copies=any(name.startswith("mtp.") and name.endswith(copies) for name in dtypes),
        draft_ignored=all(any(fnmatchcase(f"{block}.ffn.experts", glob) for glob in globs) for block in blocks),
        expert_dtype=expert_dtype,
        quant_method=method,
        quant_algo=algorithm,
        moe_quant_algo=moe_algorithm,
        release=None if release is None else release.name,
        tokens=0 if kind == NO_DRAFT else dims.draft.block_size if kind == DSPARK else MTP_TOKENS,
        nbytes=nbytes,
        widths={key: value for key, value in config.items() if type(value) is int},
    )


def read_facts(path: Path) -> Facts:
    """The facts of a checkpoint in a folder, from its headers.

    Raises:
        SourceError: it is damaged, has no weights, or is none that `facts_of` knows.
        OutputError: the run that makes it has not finished.
    """
    require_finished(path)
    with scan_source(path) as checkpoint:
        if checkpoint.problems:
            raise first_problem(checkpoint.problems, f"`{command('dsv4q', 'plan', path)}` shows all")
        require_weights(checkpoint)
        entries = checkpoint.on_disk_tensors
        dtypes = {name: entry.dtype for name, entry in entries.items()}
        return facts_of(checkpoint.config, dtypes, sum(e.nbytes for e in entries.values()), checkpoint.config_file)


def _form(linears: Mapping[str, Mapping[str, str]]) -> str:
    """The form that linears have in common; `none` of none, `other` of several or of one that nobody knows."""
    found = {_form_of_one(parts) for parts in linears.values()}
    return NONE if not found else found.pop() if len(found) == 1 else OTHER


def _form_of_one(parts: Mapping[str, str]) -> str:
    """Of one linear, by the dtypes of its tensors; see the table in foreign/layouts.py."""
    weight = parts.get("weight_packed", parts.get("weight"))
    scale = parts.get("weight_scale", parts.get("scale"))
    if weight == "I32":
        return "int"
    if weight in ("U8", "I8") and scale == "F8_E4M3":
        return "nvfp4" if {"input_global_scale", "input_scale"} & parts.keys() else "nvfp4-weight-only"
    if weight in ("U8", "I8") and scale in ("F8_E8M0", "U8"):
        return "mxfp4"
    if weight == "F8_E4M3" and scale is not None:
        return "fp8"
    return "bf16" if weight == "BF16" and scale is None else OTHER
