"""The command line as a stranger meets it: help, exit codes, streams, Ctrl-C, pipes. Never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from dsv4q.__main__ import main
from dsv4q.cli.app import app
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import write_toy
from runs import CONFIGS, finished_files

TOY = str(CONFIGS / "toy.yaml")

OPTIONS = {
    "toy": ["--config/-c", "--seed", "--grid", "--native", "--draft", "--for-vllm", "--json", "--quiet/-q"],
    "configs": ["--json", "--quiet/-q"],
    "plan": ["--config/-c", "--ranks", "--gpu-memory", "--layout", "--skeleton", "--json", "--quiet/-q"],
    "quantize": [
        "--config/-c", "--data", "--split", "--device", "--gpu-memory", "--resume/--no-resume", "--dry-run", "--json",
        "--quiet/-q",
    ],
    "rehearse": [
        "--config/-c", "--source", "--layers", "--native", "--keep", "--judge/--no-judge", "--device", "--gpu-memory",
        "--json", "--quiet/-q",
    ],
    "dequantize": ["--shards", "--device", "--resume/--no-resume", "--json", "--quiet/-q"],
    "export": ["--layout", "--source", "--config/-c", "--resume/--no-resume", "--json", "--quiet/-q"],
    "compat": ["--json", "--quiet/-q"],
    "verify-shards": ["--source", "--deep", "--device", "--json", "--quiet/-q"],
    "report": ["--out/-o", "--verify", "--verification", "--json", "--quiet/-q"],
    "eval": [
        "--reference", "--data", "--samples", "--length", "--micro-batch", "--device", "--activations", "--answers",
        "--answer-tokens", "--answers-from", "--save", "--json", "--quiet/-q",
    ],
    "diff": ["--device", "--json", "--quiet/-q"],
}  # fmt: skip
"""Every option of every command: a new one is a decision, and then it is added here and to the README."""

ARGUMENTS = {
    "toy": ["OUT"], "configs": ["NAME"], "plan": ["SOURCE"], "quantize": ["SOURCE", "OUT"], "rehearse": ["OUT"],
    "dequantize": ["NATIVE", "OUT"], "export": ["ARTIFACT", "OUT"], "compat": ["ARTIFACT"],
    "verify-shards": ["ARTIFACT"], "report": ["ARTIFACT"], "eval": ["ARTIFACT"], "diff": ["A", "B"],
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def object(self) -> dict[str, Any]:
        """The one JSON object that stdout consists of."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


def cli(*arguments: object) -> Result:
    """Run the real entry point in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    code = stopped.value.code
    return Result(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def process(*arguments: object) -> Result:
    """Run `python -m dsv4q` as a process of its own."""
    done = subprocess.run([*PYTHON, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


PYTHON = [sys.executable, "-m", "dsv4q"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, a toy, and `texts.jsonl` to calibrate on."""
    folder = tmp_path_factory.mktemp("cli")
    assert cli("toy", folder / "source", "-q").code == 0
    lines = [json.dumps({"text": f"A line of text, number {i}, that is there to be read. " * 4}) for i in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Result:
    """A real run into `out`, as a program would start it."""
    return process(
        "quantize", folder / "source", folder / "out", "-c", TOY, "--data", folder / "texts.jsonl", "--json"
    )  # fmt: skip


@pytest.fixture
def damaged(quantized: Result, folder: Path, tmp_path: Path) -> Path:
    """The artifact with one tensor less in the index."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder / "out", copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["embed.weight"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


@pytest.fixture
def misfit(tmp_path: Path) -> Path:
    """A config with two problems that only show against a source."""
    text = Path(TOY).read_text().replace("shards: 4", "shards: 2")
    text = text.replace(r"experts\.\d+\.", r"nothing\.\d+\.").replace("wq_a|", "wq_x|").replace("q_a_proj|", "q_x|")
    path = tmp_path / "misfit.yaml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------ help


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_each_command_are_these(name: str) -> None:
    options = [p for p in _commands()[name].params if p.param_type_name == "option"]
    found = ["/".join([*p.opts, *p.secondary_opts]) for p in options]
    assert sorted(found) == sorted(OPTIONS[name])


def test_there_are_no_other_commands() -> None:
    assert list(_commands()) == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_help_of_a_command_lists_and_explains_every_option_and_argument(name: str) -> None:
    result = cli(name, "--help")
    assert (result.code, result.err) == (0, "")
    for option in OPTIONS[name]:
        assert re.search(rf"^  .*{re.escape(option.split('/')[0])}\b.*\n?.*[a-z]{{3}}", result.out, re.MULTILINE)
    for argument in ARGUMENTS[name]:
        assert re.search(rf"^  {argument} <(path|str|text)> +[A-Z][a-z]+", result.out, re.MULTILINE)
    assert all(getattr(p, "help", "") for p in _commands()[name].params if p.name != "help")


@pytest.mark.parametrize("name", ["", *OPTIONS])
def test_help_fits_a_terminal_and_ends_no_sentence_in_the_middle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = cli(*([name] if name else []), "--help").out
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text.replace("COMMAND [ARGS]...", "")


def test_help_of_all_lists_every_command() -> None:
    text = cli("--help").out
    assert all(re.search(rf"^  {name}  +[A-Z].*\.$", text, re.MULTILINE) for name in OPTIONS)


def test_no_arguments_at_all_show_the_help() -> None:
    result = cli()
    assert result.code == 2 and "Commands:" in result.out + result.err


def test_short_help_option_is_the_same() -> None:
    assert cli("plan", "-h").out == cli("plan", "--help").out


def test_readme_names_every_option_of_quantize_and_every_command() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    named = [option.split("/")[-1] for option in OPTIONS["quantize"]]
    missing = [o for o in named if o not in ("-q", "-c", "--no-resume") and f"`{o}`" not in readme]
    assert missing == []
    assert [name for name in OPTIONS if f"`dsv4q {name}" not in readme] == []


def test_version_is_printed() -> None:
    result = cli("--version")
    assert result.code == 0 and re.fullmatch(r"dsv4q \S+\n", result.out)


# ------------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("--bogus",),
        ("toy",),
        ("plan",),
        ("quantize", "source", "--config", TOY),
        ("quantize", "source", "out", "--config", TOY, "--bogus"),
        ("quantize", "source", "out", "third", "--config", TOY),
        ("toy", "out", "--seed", "many"),
        ("toy", "out", "--grid", "--native"),
        ("toy", "out", "--draft", "eagle"),
        ("verify-shards",),
    ],
)
def test_a_command_line_that_makes_no_sense_is_usage_and_writes_nothing(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "rror" in result.err and "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_good_plan_is_code_0(folder: Path) -> None:
    result = cli("plan", folder / "source", "-c", TOY)
    assert (result.code, result.err) == (0, "")
    assert "695 tensors" in result.out and "problems   none" in result.out


def test_a_plan_with_problems_is_code_1_and_tells_all_of_them(folder: Path, misfit: Path) -> None:
    result = cli("plan", folder / "source", "-c", misfit)
    assert result.code == 1
    assert result.err.count("error: ") >= 2 and "matches nothing" in result.err


def test_the_line_that_a_refusal_names_lists_all_problems(tmp_path: Path) -> None:
    source = tmp_path / "so urce"
    write_toy(source, form=native_form())
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for name in ("embed.weight", "norm.weight"):
        del weight_map[name]
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refused = cli("dequantize", source, tmp_path / "out")
    (line,) = re.findall(r"`dsv4q (plan [^`]*)` (?:lists them|shows) all", refused.err)
    listed = cli(*shlex.split(line))
    assert refused.code == listed.code == 1 and listed.err.count("error: ") >= 2


def test_a_refused_run_is_code_1(folder: Path, tmp_path: Path) -> None:
    result = cli("quantize", folder / "nowhere", tmp_path / "out", "-c", TOY)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: There is no config.json here\n  where: ")


def test_a_good_artifact_verifies_with_code_0(quantized: Result, folder: Path) -> None:
    result = cli("verify-shards", folder / "out", "--deep", "--source", folder / "source")
    assert result.code == 0 and "as it must be" in result.out


def test_an_artifact_with_a_difference_is_code_3_and_the_difference_is_named(damaged: Path) -> None:
    result = cli("verify-shards", damaged)
    assert result.code == 3
    assert "DIFFERENCE" in result.out and "embed.weight" in result.out


@pytest.mark.parametrize("device", ["bogus", "mps", "meta", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there_is_code_1(device: str, folder: Path, tmp_path: Path) -> None:
    result = cli("quantize", folder / "source", tmp_path / "out", "-c", TOY, "--device", device)
    assert result.code == 1 and "no such device" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_verifying_on_a_device_that_is_not_there_is_code_1(device: str, quantized: Result, folder: Path) -> None:
    result = cli("verify-shards", folder / "out", "--deep", "--source", folder / "source", "--device", device)
    assert result.code == 1 and "no such device" in result.err


# ------------------------------------------------------------------------------------------------ json


def test_json_of_a_run_is_its_report_and_nothing_else_is_printed(quantized: Result, folder: Path) -> None:
    assert (quantized.code, quantized.err) == (0, "")
    assert quantized.object == json.loads((folder / "out" / "report.json").read_text())


def test_a_run_ends_with_its_page(quantized: Result, folder: Path) -> None:
    assert quantized.code == 0 and "no difference" in (folder / "out" / "report.html").read_text()


@pytest.mark.parametrize(("world", "rank", "first"), [(None, None, True), ("1", "0", True), ("2", "0", True),
                                                      ("2", "1", False)])  # fmt: skip
def test_of_several_ranks_only_the_first_writes_the_page(
    world: str | None, rank: str | None, first: bool, quantized: Result, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("dsv4q.quantize.quantize", lambda job, console: quantized.object)
    monkeypatch.setattr("dsv4q.report.page.write.write_missing_page", written.append)
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for name, value in (("WORLD_SIZE", world), ("RANK", rank)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert cli("quantize", folder / "source", folder / "out", "-c", TOY).code == 0
    assert written == [folder / "out"] * first


def test_data_option_replaces_the_dataset_of_the_config(quantized: Result, folder: Path) -> None:
    assert quantized.object["calibration"]["dataset"] == str(folder / "texts.jsonl")
    assert quantized.object["calibration"]["source"].endswith("texts.jsonl, 60 rows")


def test_json_of_a_plan_is_one_object(folder: Path) -> None:
    result = cli("plan", folder / "source", "-c", TOY, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.object["artifact"]["tensors"] == 695 and result.object["problems"] == []


@pytest.mark.parametrize("command", ["plan", "dry run"])
def test_json_of_a_plan_with_problems_is_one_object_too(
    command: str, folder: Path, misfit: Path, tmp_path: Path
) -> None:
    line = {"plan": ("plan",), "dry run": ("quantize", "--dry-run")}[command]
    out = () if command == "plan" else (tmp_path / "out",)
    result = cli(*line, folder / "source", *out, "-c", misfit, "--json")
    assert (result.code, result.err) == (1, "")
    assert len(result.object["problems"]) >= 2
    assert not (tmp_path / "out").exists()


def test_json_of_a_toy_is_one_object(tmp_path: Path) -> None:
    result = cli("toy", tmp_path / "toy", "--json")
    assert (result.code, result.err, result.object["tensors"]) == (0, "", 308)


@pytest.mark.parametrize("good", [True, False])
def test_json_of_a_verification_is_one_object(good: bool, quantized: Result, folder: Path, damaged: Path) -> None:
    result = cli("verify-shards", folder / "out" if good else damaged, "--json")
    assert (result.code, result.err, result.object["ok"]) == (0 if good else 3, "", good)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "nowhere", "-c", TOY),
        ("plan", "nowhere", "-c", "nothing.yaml"),
        ("quantize", "nowhere", "out", "-c", TOY),
        ("verify-shards", "nowhere"),
        ("toy", TOY),
    ],
)
def test_an_error_in_json_mode_is_one_object_with_the_reason(arguments: tuple[str, ...]) -> None:
    result = cli(*arguments, "--json")
    assert (result.code, result.err) == (1, "")
    assert list(result.object) == ["error"]
    assert result.object["error"].keys() == {"kind", "what", "where", "expected", "found", "next"}
    assert result.object["error"]["what"] and result.object["error"]["where"]


# ------------------------------------------------------------------------------------------------ quiet


def test_quiet_prints_nothing(quantized: Result, folder: Path, tmp_path: Path) -> None:
    same = ("-c", TOY, "--data", folder / "texts.jsonl")
    for line in (
        ("toy", tmp_path / "toy"),
        ("plan", folder / "source", "-c", TOY),
        ("quantize", folder / "source", folder / "out", *same),
        ("verify-shards", folder / "out", "--deep"),
    ):
        assert cli(*line, "--quiet") == Result(0, "", "")


def test_quiet_still_prints_errors(folder: Path) -> None:
    result = cli("plan", folder / "nowhere", "-c", TOY, "-q")
    assert (result.code, result.out) == (1, "") and result.err.startswith("error: ")


# ------------------------------------------------------------------------------------------------ Ctrl-C


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([*PYTHON, *map(str, arguments)], stdout=-1, stderr=-1, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_ctrl_c_stops_a_run_with_a_hint_and_the_same_command_finishes_it(
    quantized: Result, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = ("quantize", folder / "source", out, "-c", TOY, "--data", folder / "texts.jsonl")
    journal = out / ".dsv4q" / "journal.jsonl"
    with started(*line) as child:
        while child.poll() is None and (not journal.is_file() or journal.read_bytes().count(b"\n") < 2):
            time.sleep(0.002)
        child.send_signal(signal.SIGINT)
        said, error = child.communicate(timeout=60)
    assert (child.returncode, said) == (1, "")
    assert error.startswith("error: Stopped before the end") and "the same command goes on from there" in error
    assert journal.is_file() and not (out / "model.safetensors.index.json").exists()
    # In this process, which has paid for its imports already.
    assert cli(*line).code == 0
    assert finished_files(out) == finished_files(folder / "out")
    assert all((out / name).read_bytes() == (folder / "out" / name).read_bytes() for name in finished_files(out))


@pytest.mark.slow
def test_a_resumed_run_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4q.run.block import BlockWorker

    line = ("quantize", folder / "source", tmp_path / "out", "-c", TOY)
    real = BlockWorker._decoder_block

    def stop(self: BlockWorker, block: Any, *rest: Any) -> None:
        if block.task.name == "layers.2":
            raise KeyboardInterrupt
        real(self, block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWorker, "_decoder_block", stop)
        assert cli(*line).code == 1
    result = cli(*line)
    assert result.code == 0 and "Resuming: 5 of 8 blocks are done" in result.err


# ------------------------------------------------------------------------------------------------ streams


def test_a_reader_that_goes_away_causes_no_traceback(folder: Path) -> None:
    line = " ".join([*PYTHON, "plan", str(folder / "source"), "-c", TOY])
    done = subprocess.run(["bash", "-c", f"{line} | head -1"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("Tensors\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("mode", ["", "--json"])
def test_a_full_disk_under_stdout_is_an_error_and_no_traceback(mode: str, folder: Path) -> None:
    with open("/dev/full", "w") as full:
        line = [*PYTHON, "plan", str(folder / "source"), "-c", TOY, *([mode] if mode else [])]
        done = subprocess.run(line, stdout=full, stderr=-1, text=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr


def test_closed_streams_are_survived(folder: Path) -> None:
    line = " ".join([*PYTHON, "plan", str(folder / "source"), "-c", TOY])
    done = subprocess.run(["bash", "-c", f"{line} <&- >&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_is_piped_has_no_colour_and_no_bar(quantized: Result, folder: Path) -> None:
    done = process("verify-shards", folder / "out", "--deep")
    assert done.code == 0
    assert "\x1b" not in done.out + done.err and "━" not in done.err


def test_python_dash_m_is_the_same_program() -> None:
    done = process("--help")
    assert done.code == 0
    assert done.out.split("\n", 1)[1] == cli("--help").out.split("\n", 1)[1]


# ------------------------------------------------------------------------------------------------ the rest


def test_an_operating_system_error_is_an_error_and_no_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("dsv4q.config.load_config", refuse)
    result = cli("plan", folder / "source", "-c", TOY)
    assert (result.code, result.out) == (1, "")
    assert "where: /some/file" in result.err and "Permission denied" in result.err


def test_debug_variable_shows_the_traceback(folder: Path) -> None:
    line = [*PYTHON, "plan", str(folder / "nowhere"), "-c", TOY]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "DSV4Q_DEBUG": "1"})
    assert done.returncode == 1 and "Traceback" in done.stderr


def printed_by(script: str, folder: Path) -> str:
    """What a script prints that runs a plan in a process of its own."""
    line = [sys.executable, "-c", script, "plan", str(folder / "source"), "-c", TOY, "-q"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def test_a_plan_loads_no_heavy_library(folder: Path) -> None:
    script = (
        "import sys; from dsv4q.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'llmcompressor', 'datasets'} & set(sys.modules)))"
    )
    assert printed_by(script, folder) == "[]\n"


def test_a_process_ends_without_a_search_for_cycles_among_what_it_made(folder: Path) -> None:
    script = (
        "import atexit, gc, sys; from dsv4q.__main__ import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10_000))\n"
        "main(sys.argv[1:])"
    )
    assert printed_by(script, folder) == "True\n"


def test_skeleton_is_the_planned_artifact_with_holes(quantized: Result, folder: Path, tmp_path: Path) -> None:
    result = cli("plan", folder / "source", "-c", TOY, "--skeleton", tmp_path / "skeleton")
    assert result.code == 0
    for shard in sorted((folder / "out").glob("*.safetensors")):
        hollow = tmp_path / "skeleton" / shard.name
        assert hollow.stat().st_size == shard.stat().st_size
        length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        assert hollow.read_bytes()[:length] == shard.read_bytes()[:length]
    assert (tmp_path / "skeleton" / "config.json").read_bytes() == (folder / "out" / "config.json").read_bytes()


def test_skeleton_is_not_written_into_a_folder_that_holds_something(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = cli("plan", folder / "source", "-c", TOY, "--skeleton", tmp_path)
    assert result.code == 1 and "new or empty folder" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_no_skeleton_is_made_of_a_plan_with_problems(folder: Path, misfit: Path, tmp_path: Path) -> None:
    result = cli("plan", folder / "source", "-c", misfit, "--skeleton", tmp_path / "skeleton")
    assert result.code == 1
    assert not (tmp_path / "skeleton").exists()
