"""A server from outside: one request to see what it understands, then so many at once, and its counters around them.

Every request is greedy, and its prompt begins with a number of its own, so that no cache of prefixes answers for it.
A request that the server refuses is counted; a connection that fails ends the run, and what was measured is kept.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx

from dsv4q import __version__
from dsv4q.console import Console, Progress
from dsv4q.errors import ServerError, UsageError
from dsv4q.serving.client import (
    EVENTS,
    NOTHING,
    USAGE,
    Answer,
    Server,
    Wanted,
    ask,
    counters,
    first_model,
    server_at,
    understood,
)
from dsv4q.serving.counters import Counters, acceptance, generated_between
from dsv4q.serving.prompts import Message, load_prompts

FORMAT = 1
"""Version of the result's structure."""
MOST = 4096
"""Most requests at once."""
FOREIGN = 1.02
"""Tokens counted by the server over those of our answers: above this, others were served too."""


@dataclass(frozen=True)
class Job:
    """One measurement as the user asked for it."""

    url: str
    model: str | None = None
    """None: the one that the server names first."""
    concurrency: tuple[int, ...] = (1, 4, 8, 16)
    requests: int | None = None
    """For each concurrency; None: twice as many as at once, and each of our own prompts at least once."""
    max_tokens: int = 256
    prompts: Path | None = None
    key: str | None = None

    def requests_at(self, concurrency: int, prompts: int) -> int:
        """A whole number of rounds of the prompts, so that each concurrency is asked the same."""
        if self.requests is not None:
            return self.requests
        at_least = max(2 * concurrency, 8)
        return -(-at_least // prompts) * prompts if prompts <= at_least else at_least


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,4,8` as numbers.

    Raises:
        UsageError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part[:9]) <= MOST for part in parts):
        expected = f"numbers from 1 to {MOST:,} with commas between them, such as 1,4,8,16"
        raise UsageError("These are no numbers of requests", where="--concurrency", expected=expected, found=text)
    return tuple(int(part) for part in parts)


def read_key(variable: str | None) -> str | None:
    """The API key in an environment variable; None without a variable.

    Raises:
        UsageError: it is not set, or holds what no header can.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        found = "other characters" if key else "nothing"
        raise UsageError("There is no API key", where=f"--api-key-env {variable}", expected="ASCII text", found=found)
    return key


def bench(job: Job, console: Console) -> tuple[dict[str, Any], ServerError | None]:
    """Run the job; the result as plain JSON values, and what ended it before its end (`error` in the result too).

    Raises:
        ServerError: the server cannot be reached or refuses the first request.
        DataError: the prompts cannot be used.
        UsageError: not a URL.
    """
    server, chats = server_at(job.url, job.key), load_prompts(job.prompts)
    return asyncio.run(_bench(job, server, chats, console))


async def _bench(
    job: Job, server: Server, chats: list[list[Message]], console: Console
) -> tuple[dict[str, Any], ServerError | None]:
    async with server.client() as client:
        server = replace(server, model=job.model or await first_model(client, server))
        wanted, warm = await understood(client, server, _numbered(chats[0], "warm-up"), job.max_tokens)
        levels: list[dict[str, Any]] = []
        counts = [job.requests_at(number, len(chats)) for number in job.concurrency]
        begin, stopped = await counters(client, server), None
        look = begin
        with console.progress("asking", sum(counts), "requests") as progress:
            for number, count in zip(job.concurrency, counts, strict=True):
                progress.describe(f"{number} at once")
                asked = [_numbered(chats[i % len(chats)], f"{number}.{i + 1}") for i in range(count)]
                started = perf_counter()
                answers = await _all_of(client, server, asked, wanted, number, progress)
                seconds = perf_counter() - started
                before, look = look, await counters(client, server)
                levels.append(_level(number, count, answers, seconds, before, look))
                stopped = _stop(answers, number)
                if stopped is not None:
                    break
    result = {
        "format": FORMAT,
        "url": server.root,
        "model": server.model,
        "prompts": str(job.prompts) if job.prompts else f"dsv4q's own, {len(chats)}",
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "streaming": warm.streamed,
        "tokens_counted_by": warm.counted,
        "levels": levels,
        "acceptance": acceptance(begin, look).as_dict(),
        "versions": {"dsv4q": __version__},
    }
    return (result if stopped is None else {**result, "error": stopped.as_dict()}), stopped


def _numbered(chat: Sequence[Message], number: str) -> list[Message]:
    return [{**chat[0], "content": f"[{number}] {chat[0]['content']}"}, *chat[1:]]


async def _all_of(
    client: httpx.AsyncClient,
    server: Server,
    chats: Sequence[list[Message]],
    wanted: Wanted,
    concurrency: int,
    progress: Progress,
) -> list[Answer]:
    """Ask everything, so many at once; stops asking when a connection fails."""
    answers: list[Answer] = []
    lost = asyncio.Event()

    async def worker(waiting: Iterator[list[Message]]) -> None:
        for chat in waiting:
            answer = await ask(client, server, chat, wanted)
            answers.append(answer)
            progress.advance(1)
            if answer.gone:
                lost.set()
            if lost.is_set():
                return

    waiting = iter(chats)
    await asyncio.gather(*(worker(waiting) for _ in range(min(concurrency, len(chats)))))
    return answers


def _stop(answers: Sequence[Answer], concurrency: int) -> ServerError | None:
    """Why no more is asked: the connection failed, or the server refused everything."""
    failed = [answer for answer in answers if answer.failure is not None]
    gone = next((answer for answer in failed if answer.gone), None)
    if gone is None and len(failed) < len(answers):
        return None
    error = (gone or failed[0]).failure
    assert error is not None
    done = f"{len(answers) - len(failed):,} answers at concurrency {concurrency} were whole"
    return ServerError(error.what, where=error.where, found=f"{error.found}; {done}", hint=error.hint)


# ------------------------------------------------------------------------------------------------ figures


def _level(
    concurrency: int, requests: int, answers: Sequence[Answer], seconds: float, before: Counters, after: Counters
) -> dict[str, Any]:
    """Figures of one concurrency; None where there is nothing to tell."""
    whole = [answer for answer in answers if answer.failure is None]
    tokens = [answer.tokens for answer in whole if answer.tokens is not None]
    known = bool(whole) and len(tokens) == len(whole)
    rates = [a.tokens / (a.end - a.begin) for a in whole if a.tokens]
    later = [
        (a.tokens - 1) / (a.last - a.first)
        for a in whole
        if a.counted == USAGE and a.tokens and a.first and a.last and a.last > a.first
    ]
    served = generated_between(before, after)
    ours = sum(tokens) if known and all(a.counted == USAGE for a in whole) and len(whole) == len(answers) else None
    return {
        "concurrency": concurrency,
        "requests": requests,
        "whole": len(whole),
        "failed": len(answers) - len(whole),
        "failures": dict(Counter(a.failure.found or a.failure.what for a in answers if a.failure is not None)),
        "seconds": seconds,
        "output_tokens": sum(tokens) if known else None,
        "tokens_counted_by": _counted(whole),
        "prompt_tokens": sum(a.prompt_tokens or 0 for a in whole) or None,
        "output_tokens_per_s": sum(tokens) / seconds if known else None,
        "request_tokens_per_s": _median(rates) if known else None,
        "request_tokens_per_s_after_first": _median(later),
        "time_to_first_token": _times([a.first - a.begin for a in whole if a.first is not None]),
        "request_seconds": _times([a.end - a.begin for a in whole]),
        "finish_reasons": dict(Counter(a.finish or "none" for a in whole)),
        "truncated": sum(a.finish == "length" for a in whole),
        "acceptance": acceptance(before, after).as_dict(),
        "served_tokens": served,
        "others_served_too": None if served is None or ours is None else served > ours * FOREIGN + 1,
    }


def _counted(answers: Sequence[Answer]) -> str:
    """The worst way in which tokens were counted."""
    ways = {answer.counted for answer in answers}
    return next((way for way in (NOTHING, EVENTS, USAGE) if way in ways), NOTHING)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _times(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and the 99th percentile by nearest rank: of fewer than 100 values, the largest."""
    ordered = sorted(seconds)
    high = ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else None
    return {"median": _median(ordered), "p99": high}
