"""Everything that the page is made of, read from an artifact's folder. Only report.json must be there."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.files import REPORT
from dsv4q.errors import OutputError
from dsv4q.report.build import FORMAT
from dsv4q.report.page.record import Gap, Record
from dsv4q.verify.files import read_shards
from dsv4q.verify.result import Log

EVALUATION = "eval.json"
EVALUATION_FORMAT = 1
"""Version of eval.json's structure that this page shows."""

ShardBytes = dict[str, dict[str, int]]
"""Shard file -> block -> bytes of its tensors there."""


@dataclass(frozen=True)
class Inputs:
    """What the page is made of. A `Gap` says why something that should be there is not."""

    name: str
    """What the page is about: the folder's name."""
    report: Record
    config: Record | Gap
    """config.json of the artifact."""
    shards: ShardBytes | Gap
    """From the headers on disk."""
    checked: Record | Gap
    """A verification of now, as `verify-shards --json` prints it."""
    saved: Record | None = None
    """One of before, from a file."""
    evaluation: Record | Gap | None = None
    """eval.json, as `dsv4q eval --save` writes it; None: there is none."""

    @property
    def rank_count(self) -> int:
        """Ranks of the run; 1 if the report does not tell."""
        ranks = self.report.get("ranks")
        return len(ranks) if isinstance(ranks, list) else 1


def read_inputs(artifact: Path, checked: dict[str, Any] | Gap | None, saved: Path | None = None) -> Inputs:
    """Read what lies in the folder of an artifact.

    Args:
        checked: a verification of now, if there was one.
        saved: a file with what `verify-shards --json` printed.

    Raises:
        OutputError: no report.json, or one that is damaged, of dequantize, or of another format; `saved` cannot be
            used.
    """
    report = _read_report(artifact)
    judged = checked or Gap("nothing was verified")
    return Inputs(
        name=artifact.resolve().name or str(artifact.resolve()),
        report=report,
        config=_load(artifact / "config.json"),
        shards=_shard_bytes(artifact),
        checked=judged if isinstance(judged, Gap) else Record(judged, "verification"),
        saved=None if saved is None else _read_saved(saved, report),
        evaluation=_read_evaluation(artifact / EVALUATION),
    )


def _read_report(artifact: Path) -> Record:
    path = artifact / REPORT
    if not path.is_file():
        raise OutputError(
            "There is no report.json here",
            where=artifact,
            expected="the folder of an artifact that dsv4q quantize made",
            hint="dsv4q verify-shards judges artifacts of any origin",
        )
    report = _load(path)
    if isinstance(report, Gap):
        raise OutputError("The report cannot be read", where=path, expected="a JSON object", found=report)
    if report.get("command") == "export" and isinstance(report.get("origin"), dict):
        # What a run found out of the weights holds in any layout.
        report = Record({**report["origin"], "artifact": report["artifact"], "exported": report["layout"]}, path.name)
    if (command := report.get("command")) is not None:
        what = "This is the report of another command"
        raise OutputError(what, where=path, expected="that of dsv4q quantize", found=command)
    if not _has_format(report, FORMAT):
        raise OutputError(
            "The report has another format",
            where=f"{path}: format",
            expected=FORMAT,
            found=json.dumps(report.get("format"))[:80],
            hint="use the version of dsv4q that made the artifact",
        )
    return report


def _read_saved(path: Path, report: Record) -> Record:
    """A verification that was saved, if it is of this artifact."""
    found = _load(path) if path.is_file() else Gap("no such file")
    if isinstance(found, Gap) or not isinstance(found.get("checks"), dict) or not isinstance(found.get("ok"), bool):
        raise OutputError(
            "This is no saved verification",
            where=path,
            expected="what dsv4q verify-shards --json printed",
            found=found if isinstance(found, Gap) else ", ".join(map(str, found))[:120] or "{}",
        )
    made = report.get("artifact")
    if isinstance(made, dict) and _amount(found) != _amount(made):
        what = "The saved verification is of another artifact"
        by = f"{_amount(found)}, of {found.get('artifact')}"
        raise OutputError(what, where=path, expected=_amount(made), found=by)
    return found


def _amount(found: dict[str, Any]) -> str:
    return f"{found.get('tensors')} tensors, {found.get('bytes')} bytes"


def _read_evaluation(path: Path) -> Record | Gap | None:
    if not path.exists():
        return None
    found = _load(path)
    if isinstance(found, Record) and not _has_format(found, EVALUATION_FORMAT):
        return Gap(f"{path.name} has another format: {json.dumps(found.get('format'))[:80]}, not {EVALUATION_FORMAT}")
    return found


def _has_format(found: Record, expected: int) -> bool:
    return found.get("format") == expected and not isinstance(found.get("format"), bool)


def _load(path: Path) -> Record | Gap:
    """A JSON object, or why there is none."""
    if not path.exists():
        return Gap(f"{path.name} is missing")
    try:
        found = json.loads(path.read_bytes())
        return Record(found, path.name) if isinstance(found, dict) else Gap(f"{path.name} is not an object")
    except (OSError, ValueError, RecursionError) as error:
        return Gap(f"{path.name} cannot be read: {type(error).__name__}, {error}"[:200])


def _shard_bytes(artifact: Path) -> ShardBytes | Gap:
    """Bytes by shard and block, from the shards' headers."""
    found: ShardBytes = defaultdict(lambda: defaultdict(int))
    for name, holders in read_shards(artifact, Log()).holders.items():
        for holder in holders:
            found[holder.file][block_of(name)] += holder.nbytes
    return {file: dict(blocks) for file, blocks in sorted(found.items())} or Gap("no shard's header could be read")


def block_of(name: str) -> str:
    """The unit of streaming that an artifact's tensor belongs to."""
    kind, _, rest = name.partition(".")
    if kind in ("layers", "mtp"):
        return f"{kind}.{rest.partition('.')[0]}"
    return "embed" if kind == "embed" else "head"
