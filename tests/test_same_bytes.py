"""scripts/same_bytes.py: which runs it makes, and what it calls equal. The runs themselves take many minutes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import same_bytes
from same_bytes import Checkout, Result, Unusable, matrix

NAMES = ["one", "two", "three", "four", "five"]


def artifact(folder: Path, value: float = 1.0) -> Path:
    (folder / "encoding").mkdir(parents=True)
    save_file({"a": torch.full((2, 2), value), "b": torch.zeros(3)}, folder / "model-00001-of-00001.safetensors")
    (folder / "encoding" / "README.md").write_text("words")
    (folder / "report.json").write_text("{}")
    return folder


def test_the_matrix_has_every_combination_straight_and_killed() -> None:
    cases = matrix(NAMES, list(same_bytes.TOYS), [1, 2, 3], quick=False)
    assert len({(c.config, c.toy, c.ranks, c.is_killed) for c in cases}) == len(cases) == 90


def test_a_quick_matrix_is_a_third_and_has_each_config_with_each_toy_and_each_number_of_ranks() -> None:
    cases = matrix(NAMES, list(same_bytes.TOYS), [1, 2, 3], quick=True)
    assert len(cases) == 30
    assert len({c.pair for c in cases}) == 15
    assert len({(c.config, c.ranks) for c in cases}) == 15 and len({(c.toy, c.ranks) for c in cases}) == 9


def test_runs_are_killed_at_different_blocks() -> None:
    killed = [case for case in matrix(NAMES, ["bf16"], [1], quick=False) if case.is_killed]
    blocks = {same_bytes.blocks_before_kill(case) for case in killed}
    assert blocks == set(same_bytes.BLOCKS_BEFORE_KILL)


def test_equal_folders_are_equal_whatever_their_reports_say(tmp_path: Path) -> None:
    one, other = artifact(tmp_path / "one"), artifact(tmp_path / "other")
    (other / "report.json").write_text('{"seconds": 3}')
    (other / "report.html").write_text("page")
    assert same_bytes.file_differences(same_bytes.digests(one), same_bytes.digests(other)) == []


def test_a_tensor_that_differs_is_named_instead_of_its_shard(tmp_path: Path) -> None:
    one, other = artifact(tmp_path / "one"), artifact(tmp_path / "other", value=2.0)
    found = same_bytes.file_differences(same_bytes.digests(one), same_bytes.digests(other))
    assert found == ["model-00001-of-00001.safetensors: a"]


def test_a_shard_whose_header_alone_differs_is_named(tmp_path: Path) -> None:
    one, other = artifact(tmp_path / "one"), artifact(tmp_path / "other")
    shard = other / "model-00001-of-00001.safetensors"
    save_file({"a": torch.full((2, 2), 1.0), "b": torch.zeros(3)}, shard, metadata={"format": "pt"})
    found = same_bytes.file_differences(same_bytes.digests(one), same_bytes.digests(other))
    assert found == [shard.name]


@pytest.mark.parametrize("file", ["encoding/README.md", "model-00001-of-00001.safetensors"])
def test_a_missing_and_a_changed_file_are_named(tmp_path: Path, file: str) -> None:
    one, other = artifact(tmp_path / "one"), artifact(tmp_path / "other")
    (other / file).unlink()
    found = same_bytes.file_differences(same_bytes.digests(one), same_bytes.digests(other))
    assert found and all(name.startswith(file) for name in found)


def test_reports_are_compared_without_times_and_floats_to_six_digits() -> None:
    one = {"blocks": [{"digest": "a", "seconds": {"read": 1}, "errors": {"worst": 0.1}}], "ranks": [1], "format": 1}
    same = {"blocks": [{"digest": "a", "seconds": {"read": 2}, "errors": {"worst": 0.1 + 1e-9}}], "format": 1}
    other = {"blocks": [{"digest": "b", "errors": {"worst": 0.2}}], "format": 1}
    facts = [same_bytes.facts(report) for report in (one, same, other)]
    assert same_bytes.fact_differences(facts[0], facts[1]) == []
    expected = ["report.json: blocks[0].digest", "report.json: blocks[0].errors.worst"]
    assert same_bytes.fact_differences(facts[0], facts[2]) == expected


def test_the_worst_of_tensors_without_error_does_not_count() -> None:
    one, other = ({"errors": {"worst": worst, "worst_tensor": name}} for worst, name in ((0.0, "a"), (0.0, "b")))
    assert same_bytes.facts(one) == same_bytes.facts(other)
    assert same_bytes.facts({"worst": 0.1, "worst_tensor": "a"}) != same_bytes.facts(
        {"worst": 0.1, "worst_tensor": "b"}
    )


def test_a_comparison_counts_a_run_that_differs_from_the_others_of_its_checkout(tmp_path: Path) -> None:
    checkout = Checkout("A", tmp_path, tmp_path)
    comparison = same_bytes.Comparison(checkout, Checkout("B", tmp_path, tmp_path), {})
    for case, digest in zip(matrix(["one"], ["bf16"], [1], quick=False), ("x", "y"), strict=True):
        comparison.results["A", case] = Result({"index": digest}, {})
    (line,) = comparison.within()
    assert line.endswith("all 2 runs of A: DIFFERENT: index") and comparison.different == 1


def test_finished_blocks_are_the_whole_lines_after_the_first(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    assert same_bytes.finished_blocks(journal) == 0
    journal.write_text('{"identity": 1}\n{"block": "embed"}\n{"block": "lay')
    assert same_bytes.finished_blocks(journal) == 1


def test_a_change_of_the_code_changes_the_digest_of_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "src" / "dsv4q").mkdir(parents=True)
    code = tmp_path / "src" / "dsv4q" / "exact.py"
    code.write_text("headroom = 1.0\n")
    before = Checkout("A", tmp_path, tmp_path).digest
    code.write_text("headroom = 2.0\n")
    assert Checkout("A", tmp_path, tmp_path).digest != before


def test_a_folder_without_the_code_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, same_bytes.__file__, tmp_path, tmp_path, "--work", tmp_path / "work"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: expected src/dsv4q to be imported")


def test_shipped_configs_are_written_at_the_size_of_a_toy(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    shutil.copytree(root / "configs", tmp_path / "configs")
    written = same_bytes.write_configs(Checkout("A", tmp_path, tmp_path / "work"))
    shipped = sorted(path.stem for path in (root / "configs").glob("*.yaml"))
    texts = {name: same_bytes.yaml.safe_load(path.read_text()) for name, path in written.items()}
    assert sorted(texts) == shipped
    assert all(config["output"] == {"shards": 4} for config in texts.values())
    assert "calibration" not in texts["w4a16-fp8-mtp"]


def test_results_survive_as_json(tmp_path: Path) -> None:
    result = Result(same_bytes.digests(artifact(tmp_path / "one")), {"format": 1}, 2)
    assert Result(**json.loads(json.dumps(vars(result)))) == result


@pytest.mark.parametrize("wrong", [["--gpu", "--ranks", "2"], ["--ranks", "0"], ["--toys", "other"]])
def test_flags_that_make_no_sense_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        same_bytes.arguments(["a", "b", *wrong])


def test_a_run_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.exit('no such thing')"], stderr=subprocess.PIPE, text=True
    )
    with pytest.raises(Unusable, match=r"exit code 1, .*run\.log: no such thing"):
        same_bytes.wait_for(process, tmp_path / "run.log")
