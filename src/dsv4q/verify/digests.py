"""An artifact against the SHA-256 of every block that its own report.json holds: any changed byte, without a source.

A block's digest is that of `name sha256` lines of its tensors, sorted by name. Which tensor it is cannot be told.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.files import REPORT
from dsv4q.verify.case import Case, Contract

NONE = f"no {REPORT} with SHA-256 of its blocks: whether bytes are those that were written is not known"


def reported_digests(root: Path) -> dict[str, str]:
    """Block -> digest; empty if report.json has none."""
    try:
        report: Any = json.loads((root / REPORT).read_bytes())
        found = {block["block"]: block["digest"] for block in report["blocks"]}
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return {}
    fine = all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in found.values())
    return found if fine else {}


def compare_digests(case: Case, reported: dict[str, str]) -> None:
    """Blocks all of whose tensors were read; nothing of one in which something else is wrong."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in case.contract.tensors:
        blocks[_block(case.contract, name)].append(name)
    told = {_block(case.contract, one.tensor) for one in case.log.differences if one.tensor}
    for block, names in blocks.items():
        there = [name for name in names if name in case.sound or name not in case.contract.copies]
        if block in told or any(name not in case.digests for name in there):
            continue
        case.log.looked_at("digests")
        lines = "".join(f"{name} {case.digests[name]}\n" for name in sorted(there))
        digest = hashlib.sha256(lines.encode()).hexdigest()
        if digest != reported.get(block):
            expected = f"{block} with the SHA-256 of {REPORT}, {reported.get(block, 'which has none')}"
            found = f"{digest}: its {len(there):,} tensors are not those that were written"
            case.log.differs("digests", file=REPORT, expected=expected, found=found)


def _block(contract: Contract, name: str) -> str:
    """Of a tensor that must be there, or a module of it; copies of the head belong to their MTP block."""
    module = name.rpartition(".")[0]
    for known in (name, f"{module}.weight", f"{name}.weight"):
        if known in contract.specs:
            return contract.specs[known].block
    return ".".join(name.split(".")[:2])
