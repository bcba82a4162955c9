"""config.json on its way from the source into what is made of it: every key kept, but for what is not true there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.folder import has_local_path, texts_in
from dsv4q.errors import SourceError

_DTYPES = ("torch_dtype", "dtype")
"""The old and the new name; weights that stay as they are are BF16, and a consumer computes in this type."""

_ROTARY = ("yarn", "default", "linear", "dynamic")
_NUMBERS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")


def carried_config(config: dict[str, Any], file: Path) -> tuple[dict[str, Any], list[SourceError]]:
    """The keys of a source's config.json (`file`) that go on, and a warning for each that is left out or changed.

    Left out are `quantization_config`, local paths, and an `auto_map` whose Python files are missing.
    """
    found, warnings = {}, []

    def warn(what: str, key: str, value: object, hint: str) -> None:
        warnings.append(SourceError(what, where=f"{file}: {key}", found=json.dumps(value)[:200], hint=hint))

    for key, value in config.items():
        missing = [name for name in _modules(value) if not (file.parent / name).is_file()] if key == "auto_map" else []
        if key == "quantization_config":
            continue
        if key in _DTYPES and value != "bfloat16":
            warn("config.json names another dtype than that of the weights", key, value, "bfloat16 is written instead")
            found[key] = "bfloat16"
        elif missing:
            hint = f"it is left out, for {', '.join(missing)} is not in the source; the model needs no code of its own"
            warn("config.json refers to Python files that are not there", key, value, hint)
        elif key == "_name_or_path" or has_local_path(value):
            if value:
                warn("config.json has a path of another machine", key, value, "it is left out")
        else:
            found[key] = value
    return found, warnings


def rotary_problem(config: Mapping[str, Any], file: Path) -> SourceError | None:
    """What is wrong with `rope_scaling`: transformers, and vLLM, would stop at it after minutes, without a name.

    DeepSeek-V4 has YaRN (https://arxiv.org/abs/2309.00071). null, the old name `rope_type` and the plain scalings are
    taken; their keys are those of transformers' `modeling_rope_utils`.
    """
    scaling = config.get("rope_scaling") or None
    if scaling is None:
        return None
    kind = scaling.get("type", scaling.get("rope_type", "default")) if isinstance(scaling, dict) else None
    hint = 'the releases have {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, …}'
    if kind not in _ROTARY:
        return SourceError(
            "config.json has a rope_scaling that DeepSeek-V4 does not know",
            where=f"{file}: rope_scaling",
            expected=" or ".join(_ROTARY),
            found=json.dumps(scaling)[:200],
            hint=hint,
        )
    wrong = [key for key in _NUMBERS if key in scaling and not _is_number(scaling[key])]
    if kind != "default" and not _is_number(scaling.get("factor")):
        wrong = ["factor", *(key for key in wrong if key != "factor")]
    if not wrong:
        return None
    return SourceError(
        "config.json has a rope_scaling without all of its numbers",
        where=f"{file}: rope_scaling.{wrong[0]}",
        expected="a positive number",
        found=json.dumps(scaling[wrong[0]])[:200] if wrong[0] in scaling else "absent",
        hint=hint,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def code_files(folder: Path) -> list[str]:
    """Python files in a source's folder, if config.json or tokenizer_config.json there refer to any."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            parsed = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # whoever needs the file says what is wrong with it
        if isinstance(parsed, dict) and any((folder / module).is_file() for module in _modules(parsed.get("auto_map"))):
            return sorted(path.name for path in folder.glob("*.py") if path.is_file())
    return []


def _modules(auto_map: object) -> list[str]:
    """Files that an `auto_map` refers to by `module.Class`; one of another repository is `repository--module.Class`."""
    texts = [text for text in texts_in(auto_map) if "." in text and "--" not in text]
    return sorted({f"{text.rpartition('.')[0].replace('.', '/')}.py" for text in texts})
