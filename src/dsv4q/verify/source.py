"""The source as a witness: what of it cannot be compared, and the files that an artifact takes over from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsv4q.checkpoint.headers import shown
from dsv4q.checkpoint.native import entries_of
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import SourceError
from dsv4q.layout import Dims
from dsv4q.verify.case import Case


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
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            found = "another file" if copy.is_file() else "no such file"
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
            found=_found(problem, count),
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


def _found(problem: SourceError, count: int) -> str:
    """What is wrong, what follows, and what to do."""
    what = problem.what if problem.found is None else f"{problem.what}: {problem.found}"
    follows = f"{count:,} of its tensors not compared" if count else None
    return "; ".join(part for part in (what, follows, problem.hint) if part)


def _compare_configs(case: Case, config: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Every key kept. Without its draft, an artifact says so in num_nextn_predict_layers and compress_ratios."""
    dropped = config.get("num_nextn_predict_layers") == 0
    for key in sorted((config.keys() | source.keys()) - {"quantization_config"}):
        case.log.looked_at("source")
        ours, theirs = config.get(key, "no such key"), source.get(key, "no such key")
        if key == "compress_ratios":
            layers = Dims.from_config(config).layers
            ours, theirs = (value[:layers] if isinstance(value, list) else value for value in (ours, theirs))
        if ours != theirs and not (dropped and key == "num_nextn_predict_layers"):
            case.log.differs("source", file="config.json", expected=f"{key}: {theirs!r}", found=repr(ours))
