"""What a pod, a shell or a closed terminal do to a run: variables of ranks, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from users import config, dsv4q, small_source

RANK_VARIABLES = {
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29517", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("environment") / "source")


# ------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("empty", [False, True])
def test_variables_that_a_pod_has_left_over_stop_nothing_and_are_said(
    missing: str, empty: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in RANK_VARIABLES.items():
        if name != missing or empty:
            monkeypatch.setenv(name, "" if name == missing else value)
    said = dsv4q("quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu")
    assert said.code == 0
    assert "is complete" in said.out
    if missing != "WORLD_SIZE":  # RANK=1 alone may be of a first pod
        assert f"{missing} missing" in said.err
        assert "alone" in said.err


def test_other_commands_speak_in_a_pod_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "problems   none" in dsv4q("plan", source, "-c", config(tmp_path)).out
    rehearsed = dsv4q("rehearse", tmp_path / "out", "-c", config(tmp_path), "--source", source, "--device", "cpu")
    assert rehearsed.code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", None), ("RANK", ""), ("WORLD_SIZE", "two"), ("RANK", "2"), ("RANK", "-1"), ("LOCAL_RANK", "x"),
        ("MASTER_PORT", "port"), ("WORLD_SIZE", "0"), ("MASTER_ADDR", None), ("LOCAL_WORLD_SIZE", "many"),
    ],
)  # fmt: skip
def test_a_bad_variable_under_torchrun_is_named(
    name: str, value: str | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, found in ({**RANK_VARIABLES, "TORCHELASTIC_RUN_ID": "none"} | {name: value}).items():
        monkeypatch.delenv(key, raising=False) if found is None else monkeypatch.setenv(key, found)
    said = dsv4q("quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu")
    assert said.code == 1
    assert f"where: {name}" in said.err
    assert not (tmp_path / "out").exists()


def test_a_rank_that_nobody_else_joins_says_for_whom_it_waits(source: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "dsv4q", "quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu"
    ]  # fmt: skip
    with subprocess.Popen(command, env=os.environ | RANK_VARIABLES, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.kill()
    assert line.startswith("Rank 1 of 2 waits at localhost:29517 for the others")


# ------------------------------------------------------------------------------------------------ signals

STOPPED = """
import os, signal, sys
from dsv4q.__main__ import main
from dsv4q.run.pipeline import BlockLoop
real = BlockLoop._next
def stopped(self, blocks, task, watch):
    if task.name == "layers.1":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return real(self, blocks, task, watch)
BlockLoop._next = stopped
main()
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_run_that_a_signal_ends_says_so_and_goes_on_later(number: int, source: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(source), str(tmp_path / "out"), "-c", str(config(tmp_path)), "--device", "cpu"]
    environment = {**os.environ, "SIGNAL": str(int(number)), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STOPPED, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Stopped before the end" in done.stderr
    assert "Resuming" in dsv4q(*arguments).err


def test_scikit_learn_is_not_imported_where_it_is_installed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("raise SystemExit('scikit-learn is imported')\n")
    command = [sys.executable, "-m", "dsv4q", "quantize", source, tmp_path / "out", "-c", config(tmp_path)]
    there = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([*command, "--device", "cpu"], env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
