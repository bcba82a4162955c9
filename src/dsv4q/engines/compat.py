"""compat.yaml as rules: what each engine makes of a checkpoint, and what stands behind saying so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dsv4q.engines.facts import Facts
from dsv4q.layout import NO_DRAFT

DATA = Path(__file__).parent / "compat.yaml"

LOADS, FAILS, WRONG, UNKNOWN = "loads", "fails", "wrong", "unknown"
"""Verdicts; `WRONG` loads and computes something else without an error."""
WORDS = {LOADS: "yes", FAILS: "no", WRONG: "no: wrong, without an error", UNKNOWN: "not known"}
"""For people: whether an engine loads it."""


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a checkpoint, or of its draft."""

    loads: str
    why: str
    known: str
    """`run` or `read`; empty if it is not known."""
    source: str
    """What was run, or which file of the engine was read."""


_NO_RULE = Verdict(UNKNOWN, "no rule of the table is about this form", "", "")


@dataclass(frozen=True)
class Row:
    """One engine, one version."""

    engine: str
    version: str
    model: Verdict
    draft: Verdict | None
    """None where there is no draft, or the model does not load."""
    widths: Verdict | None = None
    """Why this one cannot be built, though its form can: numbers for which the engine has no kernels."""

    @property
    def name(self) -> str:
        return f"{self.engine} {self.version}"

    @property
    def served(self) -> bool:
        """Whether it serves the model, and the draft if there is one."""
        return self.widths is None and self.model.loads == LOADS and (self.draft is None or self.draft.loads == LOADS)

    @property
    def word(self) -> str:
        """For a table: `yes`, `yes, not its draft`, `no` …"""
        if self.widths is not None:
            return "not at these widths"
        word = WORDS[self.model.loads]
        if self.model.loads != LOADS or self.draft is None or self.draft.loads == LOADS:
            return word
        return f"{word}, its draft {'is not known' if self.draft.loads == UNKNOWN else 'not'}"

    @property
    def reasons(self) -> str:
        """Why, of the model and of a draft that does not load or loads for another reason."""
        told = [] if self.draft is None or self.draft.why == self.model.why else [f"draft: {self.draft.why}"]
        return "; ".join([self.model.why, *told, *([] if self.widths is None else [self.widths.why])])

    @property
    def evidence(self) -> str:
        """What stands behind the verdicts: `run` or `read`, and of what."""
        sources: dict[str, dict[str, None]] = {}
        for verdict in (self.model, self.draft, self.widths):
            if verdict is not None and verdict.known:
                sources.setdefault(verdict.known, {})[verdict.source] = None
        return "; ".join(f"{known}: {'; '.join(found)}" for known, found in sources.items())

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "served": self.served}


@cache
def table() -> Mapping[str, Any]:
    """The data file."""
    data: Mapping[str, Any] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return data


def rows_of(facts: Facts) -> list[Row]:
    """What each engine of the table makes of a checkpoint."""
    rows = []
    for engine in table()["engines"]:
        model = _decided(engine["model"], facts)
        has_draft = facts.draft != NO_DRAFT and model.loads == LOADS
        draft = _decided(engine["draft"], facts) if has_draft else None
        widths = _without_kernels(engine, facts.widths) if model.loads == LOADS else None
        rows.append(Row(engine["name"], str(engine["version"]), model, draft, widths))
    return rows


def widths_without_kernels(engine: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Numbers of a config.json for which an engine of the table has no kernels: key, what it takes, what it is."""
    found = []
    for key, rule in engine.get("widths", {}).get("rules", {}).items():
        width = config.get(key)
        if type(width) is not int:
            continue
        if isinstance(rule, list):
            words, holds = " or ".join(map(str, rule)), width in rule
        elif "most" in rule:
            words, holds = f"at most {rule['most']}", width <= rule["most"]
        else:
            words, holds = f"a multiple of {rule['multiple']}", width % rule["multiple"] == 0
        if not holds:
            found.append((key, words, width))
    return found


def _without_kernels(engine: Mapping[str, Any], widths: Mapping[str, int]) -> Verdict | None:
    found = widths_without_kernels(engine, widths)
    if not found:
        return None
    stated = engine["widths"]
    told = ", ".join(f"{key} {width} (it takes {words})" for key, words, width in found)
    return Verdict(FAILS, f"{stated['why']}: {told}", stated["known"], stated["source"])


def _decided(rules: Iterable[Mapping[str, Any]], facts: Facts) -> Verdict:
    for rule in rules:
        if _holds(rule["when"], facts):
            return Verdict(rule["loads"], rule["why"], rule["known"], rule["source"])
    return _NO_RULE


def _holds(when: Mapping[str, Any], facts: Facts) -> bool:
    words = {key: wanted if isinstance(wanted, list) else [wanted] for key, wanted in when.items()}
    return all(getattr(facts, key) in wanted for key, wanted in words.items())


# ------------------------------------------------------------------------------------------------ serving


@dataclass(frozen=True)
class Serving:
    """How an engine is started with a checkpoint."""

    engine: str
    version: str
    command: str
    known: str
    """`run`, a server was started so; or `read`."""
    source: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.version}"

    @property
    def evidence(self) -> str:
        """What stands behind the command, in words."""
        if self.known == "run":
            return f"run: {self.source}"
        return f"its options were read in {self.source}; it was not run"


def serving(engine: str, draft: str, tokens: int, gpus: int) -> Serving:
    """The command line of an engine for a checkpoint with a draft of this kind.

    Args:
        draft: its kind; `none` if it is not to be used.
        tokens: that it proposes at a time.
    """
    entry = next(entry for entry in table()["serve"] if entry["name"] == engine)
    numbers = {"gpus": gpus, "tokens": tokens, "window": tokens + 1}
    lines = [line if line != "{draft}" else entry["draft"].get(draft, "") for line in entry["lines"]]
    text = " \\\n  ".join(line for line in lines if line)
    for key, number in numbers.items():
        text = text.replace(f"{{{key}}}", str(number))
    run = entry.get("run", {}).get(draft)
    known, source = (entry["known"], entry["source"]) if run is None else ("run", run)
    return Serving(engine, str(entry["version"]), text, known, source)


def servings(facts: Facts, rows: Sequence[Row]) -> list[Serving]:
    """The command lines of the engines that load a checkpoint; one for each engine, of its newest version."""
    found: dict[str, Serving] = {}
    known = {entry["name"]: str(entry["version"]) for entry in table()["serve"]}
    for row in rows:
        if row.model.loads == LOADS and known.get(row.engine) == row.version:
            has_draft = row.draft is not None and row.draft.loads == LOADS
            found[row.engine] = serving(row.engine, facts.draft if has_draft else NO_DRAFT, facts.tokens, facts.gpus[0])
    return list(found.values())


@dataclass(frozen=True)
class Hardware:
    """What the routed experts run on."""

    text: str
    """For people; empty where the table has nothing to say."""
    rows: tuple[Mapping[str, str], ...]
    """`name`, `version`, `sm`, `experts`, `known`, `source` of each engine that loads the checkpoint."""


def hardware_of(facts: Facts, rows: Sequence[Row]) -> Hardware:
    """What the routed experts of a checkpoint run on, by engine and SM."""
    loading = {(row.engine, row.version) for row in rows if row.model.loads == LOADS}
    for entry in table()["hardware"]:
        if _holds(entry["when"], facts):
            there = (one for one in entry["engines"] if (one["name"], one["version"]) in loading)
            return Hardware(entry["text"], tuple(one for one in there if _holds(one.get("when", {}), facts)))
    return Hardware("", ())
