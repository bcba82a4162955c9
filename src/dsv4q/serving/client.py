"""One chat completion of an OpenAI-compatible server, timed; the server's models; its metrics.

Streaming is server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): lines `data: {...}`,
at the end `data: [DONE]`, which some servers leave out; then a `finish_reason` must have come. Tokens are counted by
the server (`usage`, asked for with `stream_options`); where it does not, by events with text, of which one may hold
several tokens, so that is a lower bound and is marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx

from dsv4q.errors import ServerError, UsageError
from dsv4q.serving.counters import Counters, parse_counters
from dsv4q.serving.prompts import Message

CONNECT_SECONDS = 15.0
SILENT_SECONDS = 600.0
"""A server that sends nothing for so long is given up."""

USAGE, EVENTS, NOTHING = "usage", "events", "none"
"""Who counted the tokens: the server, we by events (a lower bound), nobody."""

_TEXT = ("content", "reasoning_content", "reasoning")
"""Fields of a delta that hold generated text."""
_HOST = re.compile(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", re.ASCII)
"""A name or an address: of others the system's resolver raises what is no OSError."""
_MISUNDERSTOOD = (400, 404, 405, 422, 501)
"""Statuses of a server that may only mind a field of the request."""


@dataclass(frozen=True)
class Server:
    """Where the server is and what it is asked for."""

    root: str
    """Without a trailing `/v1`: metrics are there."""
    key: str | None = field(default=None, repr=False)
    model: str = ""

    @property
    def chat_url(self) -> str:
        return f"{self.root}/v1/chat/completions"

    def client(self) -> httpx.AsyncClient:
        """A client with as many connections as are wanted; close it."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS, pool=None),
            # Servers close idle connections after 5 s; one that does so while a request is sent looks like a crash.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1.0),
        )


def server_at(url: str, key: str | None) -> Server:
    """The server at `url`, with or without `/v1` at its end.

    Raises:
        UsageError: not an http or https URL with a host.
    """
    try:
        parsed = httpx.URL(url.strip())
        _ = parsed.host  # decodes it, which httpx does again with every request
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UsageError("This is not a URL", where=url, found=error) from error
    host, port = parsed.raw_host.decode("ascii", "replace"), parsed.port
    plain = parsed.scheme in ("http", "https") and not (parsed.query or parsed.fragment)
    if not plain or not _HOST.fullmatch(host) or not 0 < (1 if port is None else port) < 65536:
        raise UsageError("This is not the URL of a server", where=url, expected="such as http://localhost:8000")
    return Server(str(parsed).rstrip("/").removesuffix("/v1").rstrip("/"), key)


@dataclass(frozen=True)
class Wanted:
    """How a completion is asked for; what a server does not know is left out."""

    max_tokens: int
    stream: bool = True
    usage: bool = True
    """Ask for `usage` at the end of the stream."""

    def body(self, model: str, messages: Sequence[Message]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model, "messages": list(messages), "max_tokens": self.max_tokens}
        body |= {"temperature": 0, "stream": self.stream}
        return body | ({"stream_options": {"include_usage": True}} if self.stream and self.usage else {})


@dataclass
class Answer:
    """One request and what came of it. Times are of `perf_counter`, in seconds."""

    begin: float
    end: float = 0.0
    first: float | None = None
    """When the first text came; None without streaming."""
    last: float | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    counted: str = NOTHING
    finish: str = ""
    """The server's `finish_reason`."""
    streamed: bool = False
    failure: ServerError | None = None
    status: int | None = None
    """HTTP status of a failure; None if the connection failed."""
    events: int = 0
    done: bool = False

    @property
    def gone(self) -> bool:
        """The connection failed, so that further requests are in vain."""
        return self.failure is not None and self.status is None


async def ask(client: httpx.AsyncClient, server: Server, messages: Sequence[Message], wanted: Wanted) -> Answer:
    """Send one chat and read the whole answer. Whatever the server does wrong is in `failure`."""
    answer = Answer(perf_counter())
    try:
        async with client.stream("POST", server.chat_url, json=wanted.body(server.model, messages)) as response:
            if response.status_code != 200:
                answer.status = response.status_code
                answer.failure = _refused(server, response.status_code, await response.aread())
            elif "text/event-stream" in response.headers.get("content-type", ""):
                answer.streamed = True
                async for line in response.aiter_lines():
                    _take_line(answer, line, server)
            else:
                _take_whole(answer, await response.aread(), server)
    except httpx.RequestError as error:
        answer.failure, answer.status = _lost(server.chat_url, error), None
    answer.end = perf_counter()
    if answer.failure is None and answer.streamed:
        _close(answer, server)
    return answer


def _take_line(answer: Answer, line: str, server: Server) -> None:
    """One line of a stream."""
    name, _, data = line.partition(":")
    if name != "data" or not data.strip() or answer.failure is not None:
        return
    if data.strip() == "[DONE]":
        answer.done = True
        return
    event = _object(data)
    if event is None or "error" in event:
        answer.status = 200
        answer.failure = ServerError(
            "The server reports an error in its answer" if event else "The server's answer is not JSON",
            where=server.chat_url,
            found=_message(data.encode()),
        )
        return
    _take_usage(answer, event)
    for choice in _choices(event):
        delta = choice.get("delta")
        if isinstance(delta, Mapping) and any(delta.get(key) for key in _TEXT):
            answer.last = perf_counter()
            answer.first = answer.first or answer.last
            answer.events += 1
        answer.finish = choice.get("finish_reason") or answer.finish


def _take_whole(answer: Answer, raw: bytes, server: Server) -> None:
    """An answer in one piece."""
    event = _object(raw)
    if event is None or not _choices(event):
        what = "The server's answer is not a chat completion"
        answer.status, answer.failure = 200, ServerError(what, where=server.chat_url, found=_message(raw))
        return
    _take_usage(answer, event)
    answer.finish = next((c["finish_reason"] for c in _choices(event) if c.get("finish_reason")), "")


def _take_usage(answer: Answer, event: Mapping[str, Any]) -> None:
    usage = event.get("usage")
    if not isinstance(usage, Mapping):
        return
    tokens, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
    if isinstance(tokens, int):
        answer.tokens, answer.counted = tokens, USAGE
    if isinstance(prompt, int):
        answer.prompt_tokens = prompt


def _close(answer: Answer, server: Server) -> None:
    """The stream has ended: was that its end, and who counted?"""
    if not (answer.done or answer.finish):
        found = f"{answer.events} pieces of text and no end"
        answer.failure = ServerError("The server's answer broke off", where=server.chat_url, found=found)
    elif answer.tokens is None:
        answer.tokens, answer.counted = answer.events, EVENTS


# ------------------------------------------------------------------------------------------------ other questions


async def understood(
    client: httpx.AsyncClient, server: Server, messages: Sequence[Message], max_tokens: int
) -> tuple[Wanted, Answer]:
    """The most that the server understands, found by asking; and its answer.

    Raises:
        ServerError: it refuses the plainest request too, or cannot be reached.
    """
    first: ServerError | None = None
    for wanted in (Wanted(max_tokens), Wanted(max_tokens, usage=False), Wanted(max_tokens, stream=False)):
        answer = await ask(client, server, messages, wanted)
        if answer.failure is None:
            return wanted, answer
        first = first or answer.failure
        if answer.status not in _MISUNDERSTOOD:
            break
    assert first is not None
    raise first


async def first_model(client: httpx.AsyncClient, server: Server) -> str:
    """The model that the server names first.

    Raises:
        ServerError: it cannot be reached, or names none.
    """
    url, hint = f"{server.root}/v1/models", "name the model with --model"
    try:
        response = await client.get(url)
    except httpx.RequestError as error:
        raise _lost(url, error) from error
    if response.status_code != 200:
        found = f"HTTP {response.status_code}: {_message(response.content)}"
        raise ServerError("The server does not tell its models", where=url, found=found, hint=hint)
    models = (_object(response.content) or {}).get("data")
    ids = [m["id"] for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)] if models else []
    if not ids:
        raise ServerError("The server names no model", where=url, found=_message(response.content), hint=hint)
    return str(ids[0])


async def counters(client: httpx.AsyncClient, server: Server) -> Counters:
    """The server's counters now; without any, why."""
    try:
        response = await client.get(f"{server.root}/metrics")
    except httpx.RequestError as error:
        return Counters(missing=f"/metrics cannot be read: {_reason(error)}")
    if response.status_code != 200:
        return Counters(missing=f"the server has no /metrics (HTTP {response.status_code})")
    return parse_counters(response.text)


# ------------------------------------------------------------------------------------------------ failures


def _lost(url: str, error: httpx.RequestError) -> ServerError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        what, hint = "The server cannot be reached", "see that it runs, and that host and port are right"
    elif isinstance(error, httpx.TimeoutException):
        what, hint = f"The server sent nothing for {SILENT_SECONDS:.0f} s", "look at the server's own log"
    else:
        what, hint = "The server went away in the middle of an answer", "look at the server's own log"
    return ServerError(what, where=url, found=_reason(error), hint=hint)


def _refused(server: Server, status: int, raw: bytes) -> ServerError:
    hints = {401: "give the key with --api-key-env", 403: "give the key with --api-key-env", 404: "see URL and --model"}
    return ServerError(
        "The server refuses the request",
        where=f"{server.chat_url}, model {server.model!r}",
        found=f"HTTP {status}: {_message(raw)}",
        hint=hints.get(status),
    )


def _reason(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__


def _object(raw: str | bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _choices(event: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    choices = event.get("choices")
    return [choice for choice in choices if isinstance(choice, Mapping)] if isinstance(choices, list) else []


def _message(raw: bytes) -> str:
    """What a server says of an error: `error.message`, `message` or `detail` of its JSON, else its text."""
    value: Any = _object(raw) or {}
    inner = value.get("error")
    told = inner.get("message") if isinstance(inner, dict) else inner
    text = told or value.get("message") or value.get("detail") or raw.decode("utf-8", "replace").strip()
    return " ".join(str(text).split())[:300] or "nothing"
