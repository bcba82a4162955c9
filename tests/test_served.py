"""scripts/served.py with a stand-in for vLLM: what it asks for, what it shows, what it refuses. No engine runs here."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4q.console import Console, Mode
from dsv4q.evaluate import EvaluationRequest, evaluate
from dsv4q.evaluation.answers import AnswersRequest
from dsv4q.evaluation.data import DataRequest
from dsv4q.layout import CSA, SLIDING
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import FOR_VLLM, ToyConfig, with_draft, write_toy

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import served  # noqa: E402

STAND_IN = shlex.join([sys.executable, str(Path(__file__).parent / "vllm_stand_in.py")])
WIDTHS = ToyConfig(
    **FOR_VLLM,
    hidden_size=128,
    n_routed_experts=2,
    compress_ratios=(SLIDING, CSA, SLIDING),
    num_hash_layers=1,
    num_attention_heads=2,
    o_groups=1,
    shards=2,
)
SMALL = ("--samples", "4", "--length", "64", "--answers", "3", "--answer-tokens", "8", "--python", STAND_IN)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "source"
    write_toy(out, WIDTHS, 0, native_form())
    return out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["served.py", *map(str, arguments), *SMALL])
    served.main()


def copy_of(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


def test_each_checkpoint_has_a_row_with_what_the_engines_counted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_of(source, tmp_path / "other")
    run(monkeypatch, other, "--reference", source, "--tensor-parallel", "1,2", "--json", tmp_path / "found.json")
    text = capsys.readouterr().out
    for folder in (source, other):
        rows = [line for line in text.splitlines() if line.startswith(f"| {folder} |")]
        assert len(rows) == 2  # one and two GPUs
        assert all(row.endswith("| 3 of 3 | 500 | 75.00 % | 667 | 75.00 % | 1000 |") for row in rows)
    found = json.loads((tmp_path / "found.json").read_text())["runs"]
    engines = [(one["checkpoint"], one["gpus"], one["drafted"]) for one in found if "checkpoint" in one]
    assert engines == [(str(f), gpus, k) for gpus in (1, 2) for f in (source, other) for k in (0, 1, 2)]


def test_an_earlier_call_stands_in_the_same_table(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_of(source, tmp_path / "other")
    run(monkeypatch, other, "--reference", source, "--drafts", "1", "--json", tmp_path / "found.json")
    both = ("--reference", source, "--drafts", "0,1,2", "--beside", tmp_path / "found.json")
    run(monkeypatch, *both, "--json", tmp_path / "whole.json")
    engines = [one for one in json.loads((tmp_path / "whole.json").read_text())["runs"] if "checkpoint" in one]
    assert [one["drafted"] for one in engines] == [1, 1, 0, 2] and sum("nll" in one for one in engines) == 2
    text = capsys.readouterr().out.split("Tensor parallel 1:")[-1]
    (whole,) = [line for line in text.splitlines() if line.startswith(f"| {source} |")]
    (part,) = [line for line in text.splitlines() if line.startswith(f"| {other} |")]
    assert whole.endswith("| 3 of 3 | 500 | 75.00 % | 667 | 75.00 % | 1000 |")
    assert part.endswith("| 3 of 3 |  | 75.00 % | 667 |  |  |")


def test_a_table_that_is_all_there_needs_no_vllm(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    run(monkeypatch, "--reference", source, "--json", found)
    first = capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["served.py", "--reference", str(source), "--beside", str(found), *SMALL[:-2], "--python", "false"]
    )
    served.main()
    assert capsys.readouterr().out == first


def test_engines_that_share_a_gpu_are_told_how_much_of_it_is_theirs(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    real = served.Engines.serve
    monkeypatch.setattr(served.Engines, "serve", lambda self, job, more: jobs.append(job) or real(self, job, more))
    run(monkeypatch, "--reference", source, "--drafts", "0,1", "--gpu-memory", "0.25", "--cache-memory", "4GiB")
    assert [(job["gpu_memory"], job["cache_memory"]) for job in jobs] == [(0.25, 4 << 30)] * 2


def test_only_the_first_engine_of_a_checkpoint_reads_the_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--reference", source, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert [one.get("read_tokens") for one in found if "checkpoint" in one] == [4 * 64, None, None]


def test_what_a_draft_changes_in_the_source_s_own_answers_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wavers = copy_of(source, tmp_path / "wavering")
    (wavers / "wavers").touch()
    run(monkeypatch, "--reference", wavers)
    assert "those without a draft: 2 of 3 with 1 drafted, 2 of 3 with 2 drafted." in capsys.readouterr().out
    run(monkeypatch, "--reference", source, "--drafts", "0,2")
    assert "those without a draft: 3 of 3 with 2 drafted." in capsys.readouterr().out
    run(monkeypatch, "--reference", source, "--drafts", "1,2")
    assert "own answers that are" not in capsys.readouterr().out


def test_prompts_are_those_that_eval_answers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--reference", source, "--drafts", "0", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["runs"]
    request = EvaluationRequest(source, source, DataRequest(None, 4, 64, 2), "cpu", answers=AnswersRequest(3, 8))
    assert found[-1]["prompts"] == evaluate(request, Console(Mode.QUIET))["answers"]["prompts"]


def test_what_eval_said_stands_beside_what_was_served(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_of(source, tmp_path / "other")
    request = EvaluationRequest(
        other, source, DataRequest(None, 4, 64, 2), "cpu", save=True, answers=AnswersRequest(3, 8)
    )
    said = evaluate(request, Console(Mode.QUIET))
    run(monkeypatch, other, "--reference", source)
    offline = capsys.readouterr().out.split("Offline")[1]
    rate = said["answers"]["artifact"]["k_1"]["acceptance"]["value"]
    assert f"| {100 * rate:.2f} % |" in offline and f"| {other} |" in offline and "| kernels |" in offline


def test_an_engine_that_fails_is_named_and_the_others_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copy_of(source, tmp_path / "broken-one")
    (broken / "broken").touch()
    with pytest.raises(SystemExit, match=r"failed: .*broken-one, 0 drafted; .*1 drafted; .*2 drafted"):
        run(monkeypatch, broken, "--reference", source)
    text = capsys.readouterr().out
    assert f"| {broken} | failed |" in text and f"| {source} | 0." in text


def test_widths_without_a_kernel_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy(tmp_path / "toy", ToyConfig(), 0)
    with pytest.raises(SystemExit, match=r"vLLM 0\.33\.0 has no kernels") as stopped:
        run(monkeypatch, "--reference", tmp_path / "toy")
    for words in ("head_dim 512", "index_n_heads 32 or 64", "sliding_window a multiple of 64", "head_dim 64"):
        assert words in str(stopped.value)


@pytest.mark.parametrize("command", [f"{shlex.quote(sys.executable)} -S", "no-such-python", "false"])
def test_without_vllm_no_engine_is_started(
    command: str, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["served.py", "--reference", str(source), *SMALL[:-1], command])
    with pytest.raises(SystemExit, match="starts no Python that has vLLM"):
        served.main()
    assert "Traceback" not in capfd.readouterr().err


def test_without_answers_there_is_no_table_and_no_engine_is_started(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["served.py", "--reference", str(source), "--answers", "0"])
    with pytest.raises(SystemExit) as stopped:
        served.main()
    assert stopped.value.code == 2 and "--answers takes at least 1" in capsys.readouterr().err


def test_an_interrupted_table_leaves_no_engine_behind(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = served.Engines._start

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(served.Engines, "_start", lambda self: started.append(start(self)) or started[-1])
    monkeypatch.setattr(served, "require_vllm", lambda _command: None)
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--reference", source)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


@pytest.mark.parametrize("kind,tokens", [("dspark", 5), ("mtp", 2)])
def test_the_draft_is_asked_for_by_its_kind(kind: str, tokens: int, tmp_path: Path) -> None:
    config: dict[str, Any] = with_draft(WIDTHS, kind).as_config_json()
    assert served.speculation(config, tmp_path, 2) == {"method": kind, "num_speculative_tokens": tokens}
    assert served.speculation(config, tmp_path, 0) is None
