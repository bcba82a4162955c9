"""The verdicts as text: a table on the terminal, Markdown for model cards."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4q.console import Console
from dsv4q.engines.compat import LOADS, WORDS, Row, hardware_of, servings
from dsv4q.engines.facts import Facts
from dsv4q.layout import NO_DRAFT

_LAYOUTS = {
    "compressed-tensors": "compressed-tensors' layout", "modelopt": "ModelOpt's layout",
    "native": "DeepSeek's own layout", "bf16": "BF16",
}  # fmt: skip


def show_compat(facts: Facts, rows: Sequence[Row], artifact: Path, console: Console) -> None:
    """Engine, version, whether it loads; why, and what stands behind saying so; then hardware and command lines."""
    draft = "no draft" if facts.draft == NO_DRAFT else f"draft {facts.draft} with {facts.draft_experts} experts"
    console.print(
        f"{_LAYOUTS[facts.layout]}: routed experts {facts.experts}, attention {facts.attention}, {draft}"
        + ("" if facts.release is None else f"; dimensions of {facts.release}")
    )
    console.table("Engines", ["engine", "version", "loads it"], [[row.engine, row.version, row.word] for row in rows])
    for row in rows:
        for part, verdict in (("model", row.model), ("draft", row.draft), ("widths", row.widths)):
            if verdict is not None:
                known = f" ({verdict.known}: {verdict.source})" if verdict.known else ""
                console.print(f"{row.name}, {part}: {WORDS[verdict.loads]}: {verdict.why}{known}")
    hardware = hardware_of(facts, rows)
    if hardware.text:
        console.print(hardware.text)
    for gpu in hardware.rows:
        told = "{experts} ({known}: {source})".format(**gpu)
        console.print("{name} {version}, SM {sm}: ".format(**gpu) + told)
    for one in servings(facts, rows):
        console.print(f"{one.name} ({one.evidence}):\n  {_with_path(one.command, artifact)}")


def _with_path(serve: str, artifact: Path) -> str:
    return serve.replace("ARTIFACT", shlex.quote(str(artifact)))


def engines_line(rows: Sequence[Row]) -> str:
    """One line for a plan: each engine with its word."""
    return "; ".join(f"{row.name}: {row.word}" for row in rows)


def compat_json(facts: Facts, rows: Sequence[Row], artifact: Path) -> dict[str, Any]:
    """All of it, for `--json`."""
    hardware = hardware_of(facts, rows)
    return {
        "facts": vars(facts),
        "engines": [row.as_dict() for row in rows],
        "hardware": {"text": hardware.text, "engines": list(hardware.rows)},
        "serve": [vars(one) | {"command": _with_path(one.command, artifact)} for one in servings(facts, rows)],
    }


def is_loaded(rows: Sequence[Row]) -> bool:
    """Whether any engine of the table is known to load it."""
    return any(row.model.loads == LOADS and row.widths is None for row in rows)


# ------------------------------------------------------------------------------------------------ Markdown


def engines_markdown(rows: Sequence[Row]) -> str:
    """A table of the engines for a model card."""
    lines = ["| engine | loads it | why | known from |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.name} | {row.word} | {row.reasons} | {row.evidence} |" for row in rows)])


def hardware_markdown(facts: Facts, rows: Sequence[Row]) -> str:
    """What the experts run on, for a model card: the sentence, and a table by SM and engine."""
    hardware = hardware_of(facts, rows)
    if not hardware.rows:
        return hardware.text
    lines = ["| GPU | engine | routed experts | known from |", "|---|---|---|---|"]
    lines += [
        f"| SM {one['sm']} | {one['name']} {one['version']} | {one['experts']} | {one['known']}: {one['source']} |"
        for one in hardware.rows
    ]
    return "\n".join([hardware.text, "", *lines])


def serve_markdown(facts: Facts, rows: Sequence[Row]) -> str:
    """The command lines for a model card, each with what stands behind it."""
    found = [f"{one.name} ({one.evidence}):\n\n```\n{one.command}\n```" for one in servings(facts, rows)]
    return "\n\n".join(found) or "No engine of the table below is known to load this artifact."
