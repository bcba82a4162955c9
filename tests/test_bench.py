"""`dsv4q bench` against real servers on real sockets.

`transformers serve` with a tiny Llama is the packaged server; it counts no drafts. What it cannot show (counters of
drafts, failures in the middle, servers that know less) comes from the standard library's HTTP server below.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsv4q.bench import Job, bench, parse_concurrency, read_key
from dsv4q.console import Console, Mode
from dsv4q.errors import DataError, ServerError, UsageError
from dsv4q.serving.client import server_at
from dsv4q.serving.counters import Counters, acceptance, parse_counters
from dsv4q.serving.prompts import DEFAULT, load_prompts
from test_cli import cli

DRAFTS, DRAFT_TOKENS, POSITIONS = 10, 20, (8, 5)
"""What the server below counts for each answer."""
WORDS = 6
"""Tokens of its answers, two in each event."""


@dataclass
class Behaviour:
    """What the server below does; changed by tests."""

    counters: str | None = "_total"
    """Suffix of the counters' names; None: no /metrics."""
    drafts: bool = True
    usage: bool = True
    stream: bool = True
    refuses: tuple[str, ...] = ()
    """Fields of a request that are answered by 422."""
    key: str | None = None
    breaks_at: int | None = None
    """Number of the answer, from 0, that breaks off."""
    protocol: str = "HTTP/1.1"
    fails: tuple[int, ...] = ()
    """Answers that are HTTP 503."""
    error_event: bool = False
    barrier: threading.Barrier | None = None
    """Answers wait until so many requests are there."""
    others: int = 0
    """Tokens that other clients get meanwhile."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """Enough of the OpenAI API and of vLLM's metrics."""

    behaviour: Behaviour

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, json.dumps({"data": [{"id": "tiny"}, {"id": "adapter"}]}))
        elif self.path == "/metrics" and self.behaviour.counters is not None:
            self._send(200, self._metrics(), "text/plain")
        else:
            self._send(404, "Not Found", "text/plain")

    def do_POST(self) -> None:
        behaviour = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if behaviour.barrier is not None and not body["messages"][0]["content"].startswith("[warm-up]"):
            behaviour.barrier.wait(timeout=60)
        with behaviour.lock:
            behaviour.bodies.append(body)
            number = len(behaviour.bodies) - 1
        unknown = [name for name in behaviour.refuses if body.get(name)]
        if behaviour.key and self.headers.get("Authorization") != f"Bearer {behaviour.key}":
            self._send(401, json.dumps({"error": {"message": "no such key"}}))
        elif body["model"] != "tiny":
            self._send(404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}}))
        elif unknown:
            self._send(422, json.dumps({"detail": f"Unexpected fields: {unknown}"}))
        elif number in behaviour.fails:
            self._send(503, json.dumps({"message": "too busy"}))
        elif body["stream"] and behaviour.stream:
            self._stream(breaks=number == behaviour.breaks_at)
        else:
            self._whole()

    def _send(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def _stream(self, *, breaks: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        if self.protocol_version == "HTTP/1.1":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if self.behaviour.error_event:
            self._event({"error": {"message": "the engine died"}})
        for part in range(WORDS // 2):
            self._event({"choices": [{"delta": {("reasoning_content", "content")[part % 2]: "two words"}}]})
            if breaks:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
        self._count()
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        if self.behaviour.usage:
            self._event({"choices": [], "usage": {"completion_tokens": WORDS, "prompt_tokens": 9}})
        self._raw(b"data: [DONE]\n\n")
        if self.protocol_version == "HTTP/1.1":
            self.wfile.write(b"0\r\n\r\n")

    def _event(self, value: dict[str, Any]) -> None:
        self._raw(f"data: {json.dumps(value)}\n\n".encode())

    def _raw(self, data: bytes) -> None:
        chunked = self.protocol_version == "HTTP/1.1"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n" if chunked else data)

    def _whole(self) -> None:
        self._count()
        choice = {"message": {"role": "assistant", "content": "six words"}, "finish_reason": "stop"}
        usage = {"usage": {"completion_tokens": WORDS, "prompt_tokens": 9}} if self.behaviour.usage else {}
        self._send(200, json.dumps({"choices": [choice], **usage}))

    def _count(self) -> None:
        with self.behaviour.lock:
            self.behaviour.answered += 1

    def _metrics(self) -> str:
        behaviour, count = self.behaviour, self.behaviour.answered
        suffix = behaviour.counters or ""
        generated = count * WORDS + (behaviour.others if count > 1 else 0)
        lines = [f'vllm:generation_tokens{suffix}{{engine="0",model_name="tiny"}} {generated}.0']
        if behaviour.drafts:
            prefix, labels = "vllm:spec_decode_num_", 'engine="0",model_name="tiny"'
            lines += [
                f"# TYPE {prefix}drafts counter",
                f"{prefix}drafts{suffix}{{{labels}}} {count * DRAFTS}.0",
                f"{prefix}draft_tokens{suffix}{{{labels}}} {count * DRAFT_TOKENS}.0",
                f"{prefix}accepted_tokens{suffix}{{{labels}}} {count * sum(POSITIONS)}.0",
                *(
                    f'{prefix}accepted_tokens_per_pos{suffix}{{{labels},position="{i}"}} {count * n}.0'
                    for i, n in enumerate(POSITIONS)
                ),
                f"{prefix}drafts_created{{{labels}}} 1.7e+09",
            ]
        return "\n".join(lines) + "\n"


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The server's URL while it runs."""
    handler = type("Handler", (Handler,), {"behaviour": behaviour, "protocol_version": behaviour.protocol})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def measured(url: str, **changes: Any) -> tuple[dict[str, Any], ServerError | None]:
    job = {"concurrency": (1, 2), "requests": 4, "max_tokens": 6, **changes}
    return bench(Job(url, **job), Console(Mode.QUIET))


def level_of(behaviour: Behaviour, **changes: Any) -> dict[str, Any]:
    """The only level of a run that comes to its end."""
    with serving(behaviour) as url:
        result, error = measured(url, **{"concurrency": (2,), **changes})
    assert error is None
    return result["levels"][0]


def refused(behaviour: Behaviour, **changes: Any) -> ServerError:
    with serving(behaviour) as url, pytest.raises(ServerError) as caught:
        measured(url, **changes)
    return caught.value


# ------------------------------------------------------------------------------------------------ a packaged server

_NEEDED = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
needs_serve = pytest.mark.skipif(bool(_NEEDED), reason=f"`transformers serve` needs {', '.join(_NEEDED)}")


def write_llama(folder: Path) -> None:
    """A random Llama of one layer over bytes, with a tokenizer and a chat template."""
    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None  # so that every answer is as long as it may be
    model.save_pretrained(folder)


@contextmanager
def transformers_serve(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`transformers serve FOLDER` as a process of its own: its URL, once it answers, and the process."""
    (folder / "hub").mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_CACHE": str(folder / "hub")}
    with (
        (folder / "serve.log").open("wb") as log,
        subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
            while not _answers(url):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "serve.log").read_text()
                time.sleep(0.2)
            yield url, process
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and model name of a running `transformers serve`."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    with transformers_serve(folder) as (url, _):
        yield url, str(folder)


@needs_serve
def test_transformers_serve_is_measured(llama: tuple[str, str]) -> None:
    result, error = measured(llama[0], model=llama[1], concurrency=(1, 3), requests=3, max_tokens=10)
    assert error is None and result["streaming"] and result["tokens_counted_by"] == "usage"
    for level in result["levels"]:
        assert (level["whole"], level["failed"], level["output_tokens"], level["truncated"]) == (3, 0, 30, 3)
        assert level["output_tokens_per_s"] == pytest.approx(30 / level["seconds"])
        assert 0 < level["time_to_first_token"]["median"] <= level["request_seconds"]["p99"]


@needs_serve
def test_transformers_serve_has_no_counters_and_that_is_no_error(llama: tuple[str, str]) -> None:
    result = cli("bench", llama[0], "--model", llama[1], "--concurrency", 1, "--requests", 1, "--max-tokens", 4)
    assert result.code == 0
    assert "MTP drafts: none (the server has no /metrics (HTTP 404))" in result.out


@needs_serve
def test_a_wrong_model_name_is_told_in_the_words_of_transformers_serve(llama: tuple[str, str]) -> None:
    with pytest.raises(ServerError, match="refuses the request") as caught:
        measured(llama[0], model="nobody/nothing")
    assert "requested 'nobody/nothing'" in str(caught.value.found)


@needs_serve
def test_a_server_process_that_is_killed_ends_the_run_with_a_named_error(tmp_path: Path) -> None:
    write_llama(tmp_path)
    with transformers_serve(tmp_path) as (url, process):

        class Killing(Console):
            """Kills the server at the first request that is done."""

            @contextmanager
            def progress(self, description: str, total: int, unit: str = "B") -> Iterator[Any]:
                with super().progress(description, total, unit) as bar:
                    bar._show = lambda _: process.kill()
                    bar.describe = lambda text: None  # type: ignore[method-assign]
                    yield bar

        job = Job(url, str(tmp_path), (2,), 200, 200)
        result, error = bench(job, Killing(Mode.QUIET))
    assert error is not None and result["error"]["kind"] == "ServerError"
    assert 1 <= result["levels"][0]["whole"] < 200 and result["levels"][0]["failed"] >= 1


# ------------------------------------------------------------------------------------------------ speed


def test_tokens_are_those_that_the_server_counts() -> None:
    level = level_of(Behaviour())
    assert (level["output_tokens"], level["prompt_tokens"], level["tokens_counted_by"]) == (4 * WORDS, 36, "usage")
    assert level["output_tokens_per_s"] == pytest.approx(4 * WORDS / level["seconds"])


def test_without_usage_events_are_counted_and_marked() -> None:
    level = level_of(Behaviour(usage=False))
    assert (level["output_tokens"], level["tokens_counted_by"]) == (4 * WORDS // 2, "events")


def test_a_server_that_minds_stream_options_is_asked_without_them() -> None:
    behaviour = Behaviour(refuses=("stream_options",), usage=False)
    assert level_of(behaviour)["tokens_counted_by"] == "events"
    assert all("stream_options" not in body and body["stream"] for body in behaviour.bodies[1:])


@pytest.mark.parametrize("behaviour", [Behaviour(stream=False), Behaviour(refuses=("stream",))])
def test_without_streaming_there_is_speed_but_no_time_to_the_first_token(behaviour: Behaviour) -> None:
    level = level_of(behaviour)
    assert level["time_to_first_token"] == {"median": None, "p99": None}
    assert level["output_tokens"] == 4 * WORDS and level["request_tokens_per_s"] > 0


def test_without_streaming_and_usage_there_is_no_speed() -> None:
    level = level_of(Behaviour(stream=False, usage=False))
    assert (level["output_tokens_per_s"], level["request_tokens_per_s"], level["whole"]) == (None, None, 4)


def test_answers_that_were_cut_off_by_length_are_counted_apart() -> None:
    level = level_of(Behaviour())
    assert (level["truncated"], level["finish_reasons"]) == (4, {"length": 4})


def test_as_many_requests_are_under_way_as_were_asked_for() -> None:
    # Every answer waits for three others: fewer at once would never end.
    assert level_of(Behaviour(barrier=threading.Barrier(4)), concurrency=(4,), requests=8)["whole"] == 8


def test_every_request_has_a_beginning_of_its_own() -> None:
    behaviour = Behaviour()
    with serving(behaviour) as url:
        measured(url, requests=10)
    asked = [body["messages"][0]["content"][:9] for body in behaviour.bodies]
    assert len(set(asked)) == len(asked) == 1 + 2 * 10


def test_each_concurrency_is_asked_every_prompt_equally_often() -> None:
    assert [Job("").requests_at(number, 8) for number in (1, 4, 8, 16, 20)] == [8, 8, 16, 32, 40]
    assert Job("", requests=3).requests_at(16, 8) == 3


# ------------------------------------------------------------------------------------------------ counters


@pytest.mark.parametrize("suffix", ["", "_total"])
def test_acceptance_is_the_difference_of_the_counters(suffix: str) -> None:
    with serving(Behaviour(counters=suffix)) as url:
        result, _ = measured(url)
    found = result["levels"][1]["acceptance"]
    assert (found["drafts"], found["draft_tokens"], found["accepted_tokens"]) == (40, 80, 52)
    assert found["rate"] == 0.65 and found["mean_accepted_length"] == pytest.approx(2.3)
    assert found["per_position"] == [0.8, 0.5]
    assert result["acceptance"]["drafts"] == 80


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [(Behaviour(counters=None), "no /metrics"), (Behaviour(drafts=False), "without speculative decoding")],
)
def test_a_server_without_counters_gives_none_and_the_reason(behaviour: Behaviour, reason: str) -> None:
    found = level_of(behaviour)["acceptance"]
    assert found["rate"] is None and reason in found["missing"]


def test_counters_of_several_engines_are_added_up() -> None:
    lines = [f'vllm:spec_decode_num_drafts_total{{engine="{i}",model_name="a \\"b\\" c"}} {5 + i}' for i in range(2)]
    lines += ["vllm:spec_decode_num_draft_tokens_total 20", "vllm:spec_decode_num_accepted_tokens_total 1e1"]
    found = parse_counters("# HELP x\n" + "\n".join(lines) + "\nnonsense\nvllm:other NaN\n")
    assert (found.drafts, found.draft_tokens, found.accepted, found.per_position) == (11, 20, 10, {})


def test_counters_that_went_back_are_not_taken_for_drafts() -> None:
    found = acceptance(Counters(10, 20, 12), Counters(2, 4, 3))
    assert "started again" in found.missing


def test_a_server_that_drafted_nothing_has_no_rate() -> None:
    assert "drafted nothing" in acceptance(Counters(10, 20, 12), Counters(10, 20, 12)).missing


@pytest.mark.parametrize(("others", "told"), [(0, False), (50, True)])
def test_tokens_that_others_got_meanwhile_are_noticed(others: int, told: bool) -> None:
    assert level_of(Behaviour(others=others))["others_served_too"] is told


# ------------------------------------------------------------------------------------------------ failures


def test_a_connection_that_is_refused_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match="cannot be reached"):
        measured(url)


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
def test_an_answer_that_breaks_off_ends_the_run_and_keeps_what_was_measured(protocol: str) -> None:
    with serving(Behaviour(breaks_at=6, protocol=protocol)) as url:
        result, error = measured(url, concurrency=(1, 1, 1))
    assert error is not None and ("went away" in error.what or "broke off" in error.what)
    assert [(level["whole"], level["failed"]) for level in result["levels"]] == [(4, 0), (1, 1)]
    assert "1 answers at concurrency 1 were whole" in str(error.found)


def test_a_request_that_is_refused_in_between_is_counted_and_told() -> None:
    level = level_of(Behaviour(fails=(2,)))
    assert (level["whole"], level["failed"], level["output_tokens"]) == (3, 1, 3 * WORDS)
    assert level["failures"] == {"HTTP 503: too busy": 1}


def test_a_server_that_refuses_everything_ends_the_run() -> None:
    with serving(Behaviour(fails=tuple(range(1, 100)))) as url:
        result, error = measured(url)
    assert error is not None and "HTTP 503: too busy" in str(error.found) and len(result["levels"]) == 1


def test_an_error_inside_a_stream_is_told_in_the_words_of_the_server() -> None:
    error = refused(Behaviour(error_event=True))
    assert "reports an error in its answer" in error.what and error.found == "the engine died"


def test_a_wrong_model_is_told_in_the_words_of_the_server() -> None:
    error = refused(Behaviour(), model="large")
    assert error.found == "HTTP 404: The model `large` does not exist." and "--model" in str(error.hint)


def test_a_missing_key_is_told_and_the_right_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--api-key-env" in str(refused(Behaviour(key="secret")).hint)
    monkeypatch.setenv("MY_KEY", "secret")
    assert level_of(Behaviour(key="secret"), key=read_key("MY_KEY"))["whole"] == 4


@pytest.mark.parametrize("value", [None, "", "schlüssel", "two\nlines"])
def test_a_variable_without_a_usable_key_is_usage(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(UsageError, match="no API key"):
        read_key("MY_KEY")


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "a", "1.5", "99999"])
def test_a_concurrency_that_is_none_is_usage(text: str) -> None:
    with pytest.raises(UsageError):
        parse_concurrency(text)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://[",
        "http://a..b",
        "http://a b",
        "http://host/?a=b",
        "http://host:99999",
    ],
)
def test_what_is_no_url_of_a_server_is_usage(url: str) -> None:
    with pytest.raises(UsageError):
        server_at(url, None)


@pytest.mark.parametrize("url", ["http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/"])
def test_a_url_may_end_in_v1_or_not(url: str) -> None:
    assert server_at(url, None).chat_url == "http://host:1/v1/chat/completions"


# ------------------------------------------------------------------------------------------------ prompts


def test_our_own_prompts_are_of_several_lengths() -> None:
    sizes = sorted(len(prompt) for prompt in DEFAULT)
    assert sizes[0] < 100 and sizes[-1] > 5000 and len(set(sizes)) == len(DEFAULT) == 8


def test_prompts_of_a_file_are_asked(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": "one"}, {"text": "two"}, "three",
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "answer"}]},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.txt").write_text("one\n\ntwo\nthree\nfour\n")
    chats = load_prompts(tmp_path / "p.jsonl")
    assert chats == load_prompts(tmp_path / "p.txt")
    assert [chat[-1]["content"] for chat in chats] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("text", ["", "\n\n", "{", "[]", '{"messages": []}', '{"prompt": 3}', "5"])
def test_a_file_without_prompts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError):
        load_prompts(tmp_path / "p.jsonl")


def test_a_file_of_prompts_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(tmp_path / "none.txt")


# ------------------------------------------------------------------------------------------------ command


def test_the_command_prints_speed_and_drafts() -> None:
    with serving(Behaviour()) as url:
        result = cli("bench", url, "--concurrency", "1,2", "--requests", 2)
    assert result.code == 0 and "model tiny" in result.out
    assert "65.0%" in result.out and "2.300" in result.out and "80.0%, 50.0%" in result.out


def test_the_command_gives_one_json_object_with_the_error_in_it() -> None:
    with serving(Behaviour(breaks_at=2)) as url:
        result = cli("bench", url, "--concurrency", 1, "--requests", 4, "--json")
    assert result.code == 1 and result.err == ""
    assert result.object["error"]["kind"] == "ServerError" and result.object["levels"][0]["whole"] == 1


def test_a_server_that_goes_away_is_an_error_after_the_table() -> None:
    with serving(Behaviour(breaks_at=2)) as url:
        result = cli("bench", url, "--concurrency", 1, "--requests", 4)
    assert result.code == 1 and result.err.count("error:") == 1
    assert "Speed" in result.out and "went away in the middle" in result.err
