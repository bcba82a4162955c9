"""What an artifact is judged as, told by its config.json and the names in its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.native import says_native
from dsv4q.errors import SourceError, command
from dsv4q.layout import Dims
from dsv4q.verify.case import COMPRESSED, Contract
from dsv4q.verify.files import Headers
from dsv4q.verify.modelopt import ModelOptContract, is_modelopt
from dsv4q.verify.modelopt_config import HF_QUANT_CONFIG
from dsv4q.verify.result import MODELOPT, PLAIN, QUANTIZED, Log


def kind_of(artifact: Path, config: Mapping[str, Any], headers: Headers) -> str:
    """`QUANTIZED`, `MODELOPT` or `PLAIN`.

    Plain: no quantization_config, and no tensor that only an artifact has: one that lost its config must not pass.

    Raises:
        SourceError: it is a release in DeepSeek's own layout.
    """
    names = headers.holders.keys() | headers.index.keys()
    if is_modelopt(config, names):
        return MODELOPT
    if any(name.endswith(COMPRESSED) for name in names):
        return QUANTIZED
    if says_native(config):
        raise SourceError(
            "This is a checkpoint in DeepSeek's own layout, of which artifacts are made",
            where=artifact,
            expected="an artifact in compressed-tensors' or ModelOpt's layout, or BF16",
            found="quant_method fp8, and no tensor that only an artifact has",
            hint=f"`{command('dsv4q', 'plan', artifact)}` looks it over; as --source an artifact is compared with it",
        )
    return PLAIN if config.get("quantization_config") is None else QUANTIZED


def contract_of(
    artifact: Path, config: Mapping[str, Any], dims: Dims, headers: Headers, kind: str, log: Log
) -> Contract:
    """Check config.json, and derive what must be there."""
    if kind != MODELOPT:
        return Contract.of(config, dims, log, plain=kind == PLAIN)
    try:
        beside = json.loads((artifact / HF_QUANT_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        beside = None
    return ModelOptContract.of_headers(config, dims, headers, {HF_QUANT_CONFIG: beside}, log)
