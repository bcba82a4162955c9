"""The output sink in all three modes, piped and on a terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4q import console as console_module
from dsv4q.console import Console, Mode, Progress, human_bytes, human_seconds
from dsv4q.errors import SourceError

NAME = "layers.42.ffn.experts.255." + "a_very_long_part_of_a_name." * 8 + "w1.weight_packed"
MODES = list(Mode)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Screen:
    """Stands for the two streams of a process; `terminals` are those that are a terminal of 80 columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *terminals: str) -> None:
        self._monkeypatch = monkeypatch
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "80")
        self._streams = {name: Terminal() if name in terminals else io.StringIO() for name in ("stdout", "stderr")}

    def console(self, mode: Mode = Mode.HUMAN) -> Console:
        # Not in the fixture: pytest puts its own streams back between a test's setup and its body.
        for name, stream in self._streams.items():
            self._monkeypatch.setattr(sys, name, stream)
        return Console(mode)

    @property
    def out(self) -> str:
        return self._streams["stdout"].getvalue()

    @property
    def err(self) -> str:
        return self._streams["stderr"].getvalue()


@pytest.fixture(params=[(), ("stdout", "stderr")], ids=["piped", "terminal"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch, *request.param)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch, "stdout", "stderr")


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch)


def refusal() -> SourceError:
    return SourceError("A shard is truncated", where="model-1.safetensors", expected=10, found=3, hint="copy it again")


CALLS: dict[str, Callable[[Console], None]] = {
    "data": lambda c: c.data({"text": "x"}),
    "print": lambda c: c.print("x"),
    "talk": lambda c: c.talk("x"),
    "warn": lambda c: c.warn("x"),
    "table": lambda c: c.table("x", ["x"], [["x"]]),
    "error": lambda c: c.error(refusal()),
}
STREAM_OF = {
    Mode.HUMAN: {"data": "", "print": "out", "talk": "err", "warn": "err", "table": "out", "error": "err"},
    Mode.JSON: {"data": "out", "print": "", "talk": "", "warn": "err", "table": "", "error": "out"},
    Mode.QUIET: {"data": "", "print": "", "talk": "", "warn": "", "table": "", "error": "err"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_each_call_writes_to_its_own_stream_alone(screen: Screen, mode: Mode, call: str) -> None:
    CALLS[call](screen.console(mode))
    out, err = bool(screen.out), bool(screen.err)
    assert {"out": out, "err": err} == {name: name == STREAM_OF[mode][call] for name in ("out", "err")}


def test_stdout_of_json_mode_is_one_json_object(screen: Screen) -> None:
    console = screen.console(Mode.JSON)
    for call in ("talk", "print", "warn", "table", "data"):
        CALLS[call](console)
    assert json.loads(screen.out) == {"text": "x"}


def test_json_error_carries_every_detail(screen: Screen) -> None:
    screen.console(Mode.JSON).error(refusal())
    assert json.loads(screen.out) == {
        "error": {
            "kind": "SourceError",
            "what": "A shard is truncated",
            "where": "model-1.safetensors",
            "expected": "10",
            "found": "3",
            "next": "copy it again",
        }
    }


@pytest.mark.parametrize("mode", [Mode.HUMAN, Mode.QUIET])
def test_error_for_people_carries_every_detail(screen: Screen, mode: Mode) -> None:
    screen.console(mode).error(refusal())
    text = screen.err
    assert all(detail in text for detail in ("truncated", "model-1.safetensors", "10", "3", "copy it again"))


def test_error_is_red_on_a_terminal(terminal: Screen) -> None:
    terminal.console().error(refusal())
    assert terminal.err.startswith("\x1b[1;31merror:\x1b[0m A shard")


def test_no_color_is_respected(terminal: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.console().error(refusal())
    assert "\x1b" not in terminal.err


def test_piped_output_has_no_escape_codes(piped: Screen) -> None:
    for call in CALLS.values():
        call(piped.console())
    assert "\x1b" not in piped.out + piped.err


def test_json_keeps_the_order_of_keys_and_fullwidth_bars(piped: Screen) -> None:
    piped.console(Mode.JSON).data({"b": "<｜User｜>", "a": [1, Path("x/y")]})
    assert piped.out == '{"b": "<｜User｜>", "a": [1, "x/y"]}\n'


def test_json_writes_null_for_an_infinite_sqnr(piped: Screen) -> None:
    piped.console(Mode.JSON).data({"sqnr": {"w1": float("inf"), "all": (1.5, float("nan"))}})
    assert json.loads(piped.out, parse_constant=pytest.fail) == {"sqnr": {"w1": None, "all": [1.5, None]}}


def test_json_refuses_a_value_without_a_json_form(piped: Screen) -> None:
    with pytest.raises(TypeError):
        piped.console(Mode.JSON).data({"x": {1, 2}})


def test_piped_table_keeps_long_names_on_one_line(piped: Screen) -> None:
    piped.console().table("Differences", ["tensor", "bytes"], [[NAME, 17]])
    assert f"{NAME}     17" in piped.out.splitlines()


def test_table_on_a_narrow_terminal_loses_no_letter_of_a_name(terminal: Screen) -> None:
    terminal.console().table("Differences", ["tensor", "bytes"], [[NAME, 17]])
    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal.out).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert NAME in "".join(line.replace("17", "").strip() for line in lines)


def test_table_takes_brackets_as_they_are(screen: Screen) -> None:
    screen.console().table("[bold]", ["shape"], [["[red]"], ["[128, 128]"]])
    assert all(text in screen.out for text in ("[bold]", "[red]", "[128, 128]"))


def test_numbers_in_a_table_are_aligned_to_the_right(piped: Screen) -> None:
    piped.console().table("t", ["class", "bytes", "n"], [["a", "3.80 GB", 12345], ["b", "181.27 GB", 7]])
    assert piped.out.splitlines()[2:] == ["a        3.80 GB  12,345", "b      181.27 GB       7"]


def test_table_row_of_the_wrong_length_is_refused(screen: Screen) -> None:
    with pytest.raises(ValueError, match="2 cells"):
        screen.console().table("t", ["a", "b"], [["only one"]])


def test_control_characters_of_a_hostile_name_are_shown_not_sent(screen: Screen) -> None:
    console = screen.console()
    console.print("a\x1b]0;owned\x07\r\x9b")
    console.table("t", ["tensor"], [["a\x1b[2J"]])
    text = screen.out
    assert "a\\x1b]0;owned\\x07\\x0d\\x9b\n" in text
    assert "a\\x1b[2J" in text


@pytest.mark.parametrize("mode", MODES)
def test_file_name_that_is_no_text_does_not_break_the_output(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        Console(mode).data({"file": "\udcff é"})
        Console(mode).error(SourceError("No such file", where="\udcff é"))
    text = (tmp_path / "out").read_text(encoding="ascii")
    assert "\\udcff" in text
    assert mode != Mode.JSON or json.loads(text.splitlines()[0]) == {"file": "\udcff é"}


def test_progress_on_a_terminal_shows_the_amount_and_the_time_left(terminal: Screen) -> None:
    with terminal.console().progress("quantizing", 4_000_000_000) as progress:
        progress.describe("layers.1")
        progress.advance(1_000_000_000)
    text = terminal.err
    assert all(part in text for part in ("layers.1", "25 %", "1.00 GB of 4.00 GB", "left"))


def test_bar_leaves_a_redirected_stdout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, "stderr")
    console = screen.console()
    with console.progress("reading", 10, "tensors") as progress:
        progress.advance(1)
        console.print("result")
    assert screen.out == "result\n"
    assert "result" not in screen.err


@pytest.mark.parametrize("mode", [Mode.JSON, Mode.QUIET])
def test_progress_is_silent_for_machines(screen: Screen, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PLAIN_INTERVAL", 0.0)
    with screen.console(mode).progress("x", 10) as progress:
        progress.advance(5)
    assert screen.out + screen.err == ""
    assert progress.done == 5


def test_piped_progress_prints_a_line_each_interval(piped: Screen) -> None:
    clock = Clock()
    piped.console()
    progress = Progress("layers", 100, "layers", console_module._PlainLines(), clock)
    for clock.now in range(0, 100, 10):
        progress.advance(1)
    assert piped.err.splitlines() == [
        "layers: 4 %, 4 of 100 layers, 30 s, 12 min 00 s left",
        "layers: 7 %, 7 of 100 layers, 1 min 00 s, 13 min 17 s left",
        "layers: 10 %, 10 of 100 layers, 1 min 30 s, 13 min 30 s left",
    ]


def test_time_left_counts_this_run_only() -> None:
    clock = Clock()
    progress = Progress("x", 100, "B", lambda _: None, clock)
    progress.skip(50)
    clock.now = 10.0
    progress.advance(10)
    assert progress.remaining == 40.0


def test_time_left_counts_down_between_two_steps() -> None:
    clock = Clock()
    progress = Progress("x", 100, "B", lambda _: None, clock)
    clock.now = 10.0
    progress.advance(10)
    clock.now = 25.0
    assert progress.remaining == 75.0


def test_time_left_is_unknown_before_the_first_step() -> None:
    progress = Progress("x", 100, "B", lambda _: None)
    assert progress.remaining is None
    assert "left" not in progress.line()


def test_progress_of_nothing_is_complete(screen: Screen) -> None:
    with screen.console().progress("x", 0) as progress:
        pass
    assert progress.percent == "100 %"


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1.00 MB"), (181_270_000_000, "181.27 GB"),
     (581_980_000_000, "581.98 GB"), (1_250_000_000_000, "1.25 TB"), (-3_800_000_000, "-3.80 GB")],
)  # fmt: skip
def test_bytes_read_as_in_the_docs(n: int, text: str) -> None:
    assert human_bytes(n) == text


@pytest.mark.parametrize(
    ("s", "text"),
    [(0, "0.00 s"), (0.421, "0.42 s"), (0.999, "1.0 s"), (3.14, "3.1 s"), (9.97, "10 s"), (42.4, "42 s"),
     (59.7, "1 min 00 s"), (725, "12 min 05 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")],
)  # fmt: skip
def test_seconds_read_as_people_say_them(s: float, text: str) -> None:
    assert human_seconds(s) == text


def test_importing_the_console_does_not_import_rich() -> None:
    code = "import sys, dsv4q.console; print([m for m in ('rich', 'torch', 'typer') if m in sys.modules])"
    result: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
