"""A server's own counters of speculative decoding: Prometheus text before and after, and what follows from both.

vLLM (`vllm/v1/spec_decode/metrics.py`) counts, for each engine: `vllm:spec_decode_num_drafts` (runs of the draft),
`..._num_draft_tokens`, `..._num_accepted_tokens` and `..._num_accepted_tokens_per_pos` with a label `position`. The
text format appends `_total` to the names of counters; some versions do not. Each run of the main model yields the
accepted tokens and one of its own, so the mean accepted length is 1 + accepted / drafts, as vLLM logs it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "vllm:spec_decode_num_"
GENERATED = "vllm:generation_tokens"

_LINE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(\{(?P<labels>.*)\})?\s+(?P<value>\S+)(\s+-?\d+)?")
_POSITION = re.compile(r'(?:^|,)\s*position="(\d+)"')


@dataclass(frozen=True)
class Counters:
    """What a server has counted since its start, all engines together."""

    drafts: float | None = None
    """None, as the others: no such counter."""
    draft_tokens: float | None = None
    accepted: float | None = None
    generated: float | None = None
    """Output tokens of all requests, also of other clients."""
    per_position: Mapping[int, float] = field(default_factory=dict)
    """Accepted tokens by their place in the draft, from 0."""
    missing: str = ""
    """Why there are no counters of drafts."""

    @property
    def has_drafts(self) -> bool:
        return None not in (self.drafts, self.draft_tokens, self.accepted)


def parse_counters(text: str) -> Counters:
    """Counters out of a /metrics page; lines that are none are passed over."""
    sums: dict[str, float] = {}
    positions: dict[int, float] = defaultdict(float)
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.fullmatch(line.strip())
        value = None if match is None else _number(match["value"])
        if match is None or value is None:
            continue
        name = match["name"].removesuffix("_total")
        sums[name] = sums.get(name, 0.0) + value
        position = _POSITION.search(match["labels"] or "")
        if name == f"{PREFIX}accepted_tokens_per_pos" and position is not None:
            positions[int(position[1])] += value
    found = Counters(
        drafts=sums.get(f"{PREFIX}drafts"),
        draft_tokens=sums.get(f"{PREFIX}draft_tokens"),
        accepted=sums.get(f"{PREFIX}accepted_tokens"),
        generated=sums.get(GENERATED),
        per_position=dict(positions),
    )
    if found.has_drafts:
        return found
    reason = f"the server's metrics have no {PREFIX}* counters: it runs without speculative decoding, or is not vLLM"
    return Counters(generated=found.generated, missing=reason)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Acceptance:
    """Drafts between two looks at the counters; `missing` says why there is nothing to tell."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    per_position: tuple[int, ...] = ()
    missing: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; None where nothing is known."""
        if self.missing:
            return {"rate": None, "mean_accepted_length": None, "missing": self.missing}
        return {
            "rate": self.accepted / self.draft_tokens,
            "mean_accepted_length": 1 + self.accepted / self.drafts,
            "per_position": [count / self.drafts for count in self.per_position],
            "drafts": self.drafts,
            "draft_tokens": self.draft_tokens,
            "accepted_tokens": self.accepted,
        }


def acceptance(before: Counters, after: Counters) -> Acceptance:
    """What happened between two looks."""
    for look in (before, after):
        if not look.has_drafts:
            return Acceptance(missing=look.missing)
    pairs = (
        (before.drafts, after.drafts),
        (before.draft_tokens, after.draft_tokens),
        (before.accepted, after.accepted),
    )
    drafts, draft_tokens, accepted = (round((new or 0) - (old or 0)) for old, new in pairs)
    places = range(max(after.per_position, default=-1) + 1)
    steps = tuple(round(after.per_position.get(i, 0) - before.per_position.get(i, 0)) for i in places)
    if min(drafts, draft_tokens, accepted, *steps) < 0:
        return Acceptance(missing="the server's counters went back: it was started again in between")
    if not drafts or not draft_tokens:
        return Acceptance(missing="the server drafted nothing in this time")
    return Acceptance(drafts, draft_tokens, accepted, steps)


def generated_between(before: Counters, after: Counters) -> int | None:
    """Output tokens that the server counted in between, those of other clients too; None if it does not count."""
    if before.generated is None or after.generated is None or after.generated < before.generated:
        return None
    return round(after.generated - before.generated)
