"""The small files of an artifact, and the index as the very last: with it the folder becomes a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dsv4q.checkpoint.files import INDEX, REPORT, write_atomic
from dsv4q.checkpoint.output import check_output
from dsv4q.checkpoint.shards import ShardPlan, index_text
from dsv4q.checkpoint.writer import write_sparse_shards
from dsv4q.errors import OutputError, RecipeError
from dsv4q.plan.model_config import code_files
from dsv4q.plan.modelcard import LICENSE_FILE, model_card
from dsv4q.plan.plan import Plan, artifact_config_text
from dsv4q.recipe.recipe import groups_of, ignored

_CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".partial", ".tmp")
_CARRIED_FOLDERS = ("encoding",)


def carried_files(source: Path) -> list[Path]:
    """Files of the source, relative to it, that go into the artifact as they are: tokenizer, license and the like."""
    found = [Path(name) for name in _CARRIED if (source / name).is_file()]
    found += [Path(p.name) for p in sorted(source.iterdir()) if p.is_file() and LICENSE_FILE.fullmatch(p.name)]
    found += [Path(name) for name in code_files(source)]
    for folder in _CARRIED_FOLDERS:
        if (source / folder).is_dir():
            inside = sorted(p for p in (source / folder).rglob("*") if p.is_file())
            found += [p.relative_to(source) for p in inside if "__pycache__" not in p.parts]
    return found


def write_small_files(
    out: Path, source: Path, plan: Plan, report: Mapping[str, Any], recipe: str | None = None
) -> None:
    """Everything but the shards. Each file is whole or not there; the index comes last.

    Args:
        recipe: recipe.yaml as an earlier run wrote it; it is taken over if it means the same.
    """
    _carry(out, source, carried_files(source))
    _write_plan_files(out, source, plan, recipe)
    _write_last(out, plan, report)


def write_plain_files(
    out: Path, source: Path, plan: ShardPlan, config: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
    """`write_small_files` of a plain checkpoint: every small file of the source, and `config` as config.json."""
    _carry(out, source, dict.fromkeys([*carried_files(source), *_other_files(source)]))
    write_atomic(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    _write_last(out, plan, report)


def write_exported_files(
    out: Path, source: Path, plan: ShardPlan, texts: Mapping[str, str], report: Mapping[str, Any]
) -> None:
    """`write_small_files` of an artifact in another tool's layout, whose config.json, card and others are `texts`."""
    _carry(out, source, carried_files(source))
    for name, text in texts.items():
        write_atomic(out / name, text)
    _write_last(out, plan, report)


def _other_files(source: Path) -> list[Path]:
    """Files beside the shards that are neither weights nor written anew."""
    anew = ("config.json", INDEX, REPORT)
    return [
        Path(p.name)
        for p in sorted(source.iterdir())
        if p.is_file() and p.suffix.lower() not in _WEIGHTS and not p.name.startswith(".") and p.name not in anew
    ]


def _write_last(out: Path, plan: ShardPlan, report: Mapping[str, Any]) -> None:
    write_atomic(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / INDEX, index_text(plan))


def _carry(out: Path, source: Path, names: Iterable[Path]) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, (source / name).read_bytes())


def _write_plan_files(out: Path, source: Path, plan: Plan, recipe: str | None = None) -> None:
    planned = plan.library_recipe()
    if recipe is None or not _means(recipe, planned):
        recipe = yaml.safe_dump(planned, sort_keys=False, allow_unicode=True, width=100)
    write_atomic(out / "recipe.yaml", recipe)
    write_atomic(out / "README.md", model_card(plan, source))
    write_atomic(out / "config.json", artifact_config_text(plan))


def _means(text: str, recipe: dict[str, Any]) -> bool:
    """Whether a recipe.yaml says the same; it has only the fields that its user set."""
    try:
        stated = yaml.safe_load(text)
        groups = [{name: scheme.model_dump() for name, scheme in groups_of(one).items()} for one in (stated, recipe)]
        return groups[0] == groups[1] and ignored(stated) == ignored(recipe)
    except (yaml.YAMLError, RecipeError, AttributeError):
        return False


def write_skeleton(out: Path, source: Path, plan: Plan) -> None:
    """The planned artifact as sparse files: true headers, index and config.json, holes for data.

    Raises:
        OutputError: `out` exists and is not empty, or lies inside the source.
    """
    folder = _begin_skeleton(out, source, plan)
    _write_plan_files(out, folder, plan)
    write_atomic(out / INDEX, index_text(plan))


def write_exported_skeleton(out: Path, source: Path, plan: ShardPlan, texts: Mapping[str, str]) -> None:
    """`write_skeleton` of an artifact in another tool's layout; see `write_exported_files`."""
    _begin_skeleton(out, source, plan)
    for name, text in texts.items():
        write_atomic(out / name, text)
    write_atomic(out / INDEX, index_text(plan))


def _begin_skeleton(out: Path, source: Path, plan: ShardPlan) -> Path:
    """Sparse shards and what is carried; the source's folder."""
    if source.is_dir():
        check_output(out, source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            "The skeleton needs a new or empty folder", where=out, hint="choose another folder; this one is untouched"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_sparse_shards(out, plan)
    folder = source if source.is_dir() else source.parent
    _carry(out, folder, carried_files(folder))
    return folder
