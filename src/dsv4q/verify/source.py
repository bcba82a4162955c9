"""The source as a witness: what of it cannot be compared, and the files that an artifact takes over from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsv4q.checkpoint.against_layout import compare_with_layout
from dsv4q.checkpoint.folder import has_local_path
from dsv4q.checkpoint.headers import shown
from dsv4q.checkpoint.native import entries_of
from dsv4q.checkpoint.source import Checkpoint, require_weights
from dsv4q.errors import SourceError
from dsv4q.layout import NO_DRAFT
from dsv4q.verify.case import COMPRESSED, Case, Contract
from dsv4q.verify.result import reason


def require_comparable(source: Checkpoint, contract: Contract) -> None:
    """Refuse a source that has nothing to compare with, or is itself an artifact.

    Raises:
        SourceError: says why, by the first problem.
    """
    require_weights(source)
    is_artifact = any(name.endswith(COMPRESSED) for name in source.tensors)
    if not is_artifact and any(name in source.tensors and source.is_whole(name) for name in contract.specs):
        return
    problems = source.problems or compare_with_layout(source, contract.dims)
    first = problems[0]
    what = "This source cannot be compared with anything: " + first.what[:1].lower() + first.what[1:]
    raise SourceError(what, where=first.where, expected=first.expected, found=first.found, hint=first.hint)


def compare_folders(case: Case) -> None:
    """The source must be sound and of the same dimensions; its config and small files must have come along."""
    source, artifact = case.source, case.artifact
    assert source is not None
    _tell_problems(case, source)
    _compare_configs(case, case.contract.config, source.config)
    for path in sorted(source.root.iterdir()) + sorted(source.root.glob("encoding/*")):
        name = path.relative_to(source.root).as_posix()
        if not path.is_file() or not name.startswith(("tokenizer", "generation_config.json", "encoding/")):
            continue
        case.log.looked_at("source")
        copy = artifact.root / name
        try:
            if copy.is_file() and copy.read_bytes() == path.read_bytes():
                continue
            found = "another file" if copy.is_file() else "no such file"
        except OSError as error:
            found = f"one that cannot be read: {error}"
        case.log.differs("source", file=name, expected="the source's file", found=found)


def _tell_problems(case: Case, source: Checkpoint) -> None:
    """Each problem once, the first of a shard with the number of tensors that are not compared for it."""
    lost = Counter(_where_it_lies(source, name) for name in case.contract.specs if case.is_lost(name))
    for problem in source.problems:
        file = next((file for file in lost if _is_about(problem, source, file)), None)
        count = 0 if file is None else lost.pop(file)
        case.log.differs(
            "source",
            file=problem.where,
            expected=problem.expected or "a sound source",
            found=reason(problem, f"{count:,} of its tensors not compared" if count else None),
        )
    for file, count in lost.items():
        found = f"damaged ones; {count:,} of its tensors not compared"
        case.log.differs("source", file=str(source.root / file), expected="whole tensors", found=found)


def _where_it_lies(source: Checkpoint, name: str) -> str:
    """The shard to blame for a tensor that is lost."""
    if name in source.hidden:
        return source.hidden[name]
    entries = entries_of(source, name)
    cut = (entry for entry in entries if entry.start + entry.nbytes > source.files[entry.file])
    return next(cut, entries[0]).file


def _is_about(problem: SourceError, source: Checkpoint, file: str) -> bool:
    place = str(source.root / shown(file))
    return str(problem.where) == place or str(problem.where).startswith(f"{place}: ")


def _may_stay_behind(key: str, value: object) -> bool:
    """A private path, and a reference to Python files, which may not be there."""
    return key in ("_name_or_path", "auto_map") or has_local_path(value)


def _compare_configs(case: Case, config: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Every key kept, as JSON has it: 1, 1.0 and true are three values.

    Without its draft, an artifact says so in num_nextn_predict_layers, has no dspark_* key, and compress_ratios may end
    with the main layers.
    """
    dims = case.contract.dims
    dropped = dims.draft.kind == NO_DRAFT
    described = ("num_nextn_predict_layers", "dspark_") if dropped else ()
    for key in sorted((config.keys() | source.keys()) - {"quantization_config"}):
        case.log.looked_at("source")
        ours, theirs = config.get(key, "no such key"), source.get(key, "no such key")
        if dropped and key == "compress_ratios" and isinstance(theirs, list) and len(ours) == dims.layers:
            theirs = theirs[: len(ours)]
        if key.startswith(described) or (key not in config and _may_stay_behind(key, theirs)):
            continue
        if key in ("dtype", "torch_dtype") and ours == "bfloat16":  # that of the weights, whatever the source calls it
            continue
        if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
            case.log.differs("source", file="config.json", expected=f"{key}: {theirs!r}", found=repr(ours))
