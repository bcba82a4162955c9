"""Calibration data as users have it: other data in the config's place, and the same data under another name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from users import calibrated, config, dsv4q, edit_config, small_source, stopping_at

TRAIN, TEST = ([{"text": f"{word} {i} " * 30} for i in range(40)] for word in ("train", "test"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("calibration") / "source")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def quantized(source: Path, settings: Path, *options: object, code: int = 0) -> dict[str, Any]:
    """What report.json says of the calibration; the error if the code is another."""
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    said = dsv4q("quantize", source, out, "-c", settings, "--device", "cpu", "--json", *options)
    assert said.code == code
    found: dict[str, Any] = json.loads(said.out)
    return found["error"] if code else found["calibration"]


def saved(folder: Path) -> Path:
    """What `datasets.save_to_disk` makes of two splits."""
    tables = {"train_sft": Dataset.from_list(TRAIN), "test_sft": Dataset.from_list(TEST)}
    DatasetDict(tables).save_to_disk(str(folder))
    return folder


def cloned(folder: Path) -> Path:
    """A clone of a hub repository with two splits."""
    for split, rows in (("train_sft", TRAIN), ("test_sft", TEST)):
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(file)
    return folder


# ------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("form", [saved, cloned])
def test_other_data_is_read_in_the_split_of_the_config(
    form: Callable[[Path], Path], source: Path, tmp_path: Path
) -> None:
    settings = calibrated(tmp_path, dataset="somebody/else", split="train_sft")
    found = quantized(source, settings, "--data", form(tmp_path / "data"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRAIN))
    alone = quantized(source, settings, "--data", tmp_path / "train.jsonl")
    assert (found["split"], alone["split"]) == ("train_sft", None)
    assert found["digest"] == alone["digest"]


@pytest.mark.parametrize("form", [saved, cloned])
def test_other_data_of_several_splits_without_that_of_the_config_wants_a_choice(
    form: Callable[[Path], Path], source: Path, tmp_path: Path
) -> None:
    settings, data = calibrated(tmp_path, dataset="somebody/else", split="train"), form(tmp_path / "data")
    error = quantized(source, settings, "--data", data, code=1)
    assert {"train_sft", "test_sft"} == set(error["found"].split(", "))
    assert "--split" in error["next"]
    assert quantized(source, settings, "--data", data, "--split", "test_sft")["split"] == "test_sft"


def test_a_folder_of_files_that_are_no_splits_is_read_whole(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (("wiki", TRAIN), ("code", TEST)):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = calibrated(tmp_path, dataset="somebody/else", split="train_sft")
    found = quantized(source, settings, "--data", tmp_path / "data")
    assert found["split"] is None
    assert "80 rows" in found["source"]


def test_a_saved_table_without_rows_is_called_empty(source: Path, tmp_path: Path) -> None:
    Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "data"))
    error = quantized(source, calibrated(tmp_path), "--data", tmp_path / "data", code=1)
    assert "empty" in error["what"]


def test_a_split_is_read_beside_one_without_rows(source: Path, tmp_path: Path) -> None:
    tables = {"train": Dataset.from_list(TRAIN), "test": Dataset.from_dict({"text": []})}
    DatasetDict(tables).save_to_disk(str(tmp_path / "data"))
    assert quantized(source, calibrated(tmp_path, split="train"), "--data", tmp_path / "data")["split"] == "train"


# ------------------------------------------------------------------------------------------------ blank rows


def test_rows_with_nothing_in_them_are_passed_over(source: Path, tmp_path: Path) -> None:
    blank = [{"messages": []}, {"messages": None}, {"messages": [{"role": "user", "content": " "}]}, {"text": ""}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (*blank, *TRAIN[:8])))
    assert quantized(source, calibrated(tmp_path), "--data", data)["conversations"] <= 8


# ------------------------------------------------------------------------------------------------ the same job


def unfinished(source: Path, settings: Path, *options: object) -> Path:
    """OUT of a run that was stopped before its last layer."""
    out = source.parent / "out"
    with stopping_at("layers.1"):
        said = dsv4q("quantize", source, out, "-c", settings, "--device", "cpu", *options)
    assert "Stopped before the end" in said.err
    return out


def resumed(source: Path, settings: Path, *options: object) -> str:
    said = dsv4q("quantize", source, source.parent / "out", "-c", settings, "--device", "cpu", *options)
    assert said.code == 0
    return said.err


def test_the_same_data_under_another_name_goes_on_with_a_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = calibrated(tmp_path)
    unfinished(source, settings)
    shutil.copy(source / "chat_samples.jsonl", tmp_path / "copy.jsonl")
    assert "Resuming" in resumed(source, settings, "--data", "./copy.jsonl")
    assert "Resuming" not in resumed(source, settings, "--data", tmp_path / "copy.jsonl")  # it is finished


def test_other_data_does_not_go_on_with_a_run(source: Path, tmp_path: Path) -> None:
    settings = calibrated(tmp_path)
    out = unfinished(source, settings)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRAIN))
    said = dsv4q("quantize", source, out, "-c", settings, "--device", "cpu", "--data", tmp_path / "train.jsonl")
    assert said.code == 1
    assert "another data" in said.err


def test_a_config_json_with_other_white_space_goes_on_with_a_run(source: Path, tmp_path: Path) -> None:
    settings = config(tmp_path)
    unfinished(source, settings)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7) + "\n\n")
    assert "Resuming" in resumed(source, settings)


def test_a_config_json_with_another_value_does_not(source: Path, tmp_path: Path) -> None:
    settings = config(tmp_path)
    out = unfinished(source, settings)
    edit_config(source, swiglu_limit=11.0)
    said = dsv4q("quantize", source, out, "-c", settings, "--device", "cpu")
    assert said.code == 1
    assert "another source" in said.err
