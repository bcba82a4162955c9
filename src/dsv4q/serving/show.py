"""What `dsv4q bench` found, for people. What a server does not tell is `none`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4q.console import Console
from dsv4q.serving.client import EVENTS, NOTHING


def show_bench(result: Mapping[str, Any], console: Console) -> None:
    """Tables of speed and of drafts, and what the figures lack."""
    console.table(
        "Speed",
        [
            "at once", "requests", "failed", "truncated", "seconds", "output tokens", "tokens/s", "per request, median",
            "first token, median", "p99",
        ],
        [_speed(level) for level in result["levels"]],
    )  # fmt: skip
    drafts = [level for level in result["levels"] if level["acceptance"]["rate"] is not None]
    if drafts:
        console.table(
            "MTP drafts, by the server's own counters",
            ["at once", "drafts", "draft tokens", "accepted", "rate", "mean accepted length", "by position"],
            [_drafts(level["concurrency"], level["acceptance"]) for level in drafts]
            + [_drafts("all", result["acceptance"])] * (result["acceptance"]["rate"] is not None),
        )
    else:
        console.print(f"MTP drafts: none ({result['acceptance'].get('missing', 'nothing was asked')})")
    console.print(
        f"server     {result['url']}, model {result['model']}; greedy, at most {result['max_tokens']} tokens an "
        f"answer; prompts: {result['prompts']}"
    )
    for note in _notes(result):
        console.print(f"note       {note}")


def _speed(level: Mapping[str, Any]) -> list[str]:
    first = level["time_to_first_token"]
    return [
        f"{level['concurrency']}", f"{level['requests']}", f"{level['failed']}", f"{level['truncated']}",
        f"{level['seconds']:.2f}", _number(level["output_tokens"], ",.0f"), _number(level["output_tokens_per_s"]),
        _number(level["request_tokens_per_s"]), _seconds(first["median"]), _seconds(first["p99"]),
    ]  # fmt: skip


def _drafts(label: object, found: Mapping[str, Any]) -> list[str]:
    places = ", ".join(f"{share:.1%}" for share in found["per_position"]) or "none"
    return [
        f"{label}", f"{found['drafts']:,}", f"{found['draft_tokens']:,}", f"{found['accepted_tokens']:,}",
        f"{found['rate']:.1%}", f"{found['mean_accepted_length']:.3f}", places,
    ]  # fmt: skip


def _number(value: float | None, form: str = ".1f") -> str:
    return "none" if value is None else format(value, form)


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value * 1000:.0f} ms"


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of these figures."""
    notes, levels = [], result["levels"]
    if not result["streaming"]:
        notes.append("the server does not stream, so there is no time to the first token")
    ways = {level["tokens_counted_by"] for level in levels}
    if EVENTS in ways:
        notes.append("the server does not count tokens: these are events of its stream, a lower bound")
    if NOTHING in ways:
        notes.append("the server does not count tokens of all answers and does not stream them, so there is no speed")
    if any(level["others_served_too"] for level in levels):
        notes.append("the server generated more tokens than we got: others use it, and acceptance is theirs too")
    for level in levels:
        notes += [f"{n} failed at {level['concurrency']} at once: {why}" for why, n in level["failures"].items()]
    return notes
