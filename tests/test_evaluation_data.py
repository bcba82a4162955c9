"""The text of an evaluation: where it is looked for, how it is cut, what is refused."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4q.__main__ import main
from dsv4q.data.spec import DataSpec
from dsv4q.data.tokens import BOS, CalibrationData, load_calibration, load_tokenizer
from dsv4q.errors import DataError, UsageError
from dsv4q.evaluation.data import DataRequest, load_data
from dsv4q.made_up.toy import write_toy

TEXT = "The old harbour is quiet in winter. Nobody paints the boats, and the nets lie dry. " * 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("data") / "source").out


def tokenized(source: Path, file: Path | None, artifact: Path | None = None, **request: Any) -> CalibrationData:
    wanted = DataRequest(**{"file": file, "samples": 5, "length": 20, "micro_batch": 2, **request})
    return load_data(wanted, source, artifact or source, 512)


def only(source: Path, to: Path, *names: str) -> Path:
    """A folder with just these files of the source."""
    to.mkdir()
    for name in names:
        (to / name).write_bytes((source / name).read_bytes())
    return to


def test_a_plain_text_is_cut_into_rows_that_begin_with_bos(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    found = tokenized(source, tmp_path / "text.txt")
    tokenizer = load_tokenizer(source)
    assert [tuple(batch.shape) for batch in found.batches] == [(2, 20), (2, 20), (1, 20)]
    rows = torch.cat(found.batches)
    assert rows[:, 0].eq(tokenizer.token_to_id(BOS)).all()
    assert rows[:, 1:].flatten().tolist() == tokenizer.encode(TEXT, add_special_tokens=False).ids[: 5 * 19]


def test_only_as_much_of_a_long_text_is_tokenized_as_is_needed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "long.txt").write_text(TEXT + "\n\n" + "another matter " * 1000)
    assert tokenized(source, tmp_path / "long.txt").digest == tokenized(source, tmp_path / "text.txt").digest


def test_a_text_that_is_just_long_enough_will_do_and_a_shorter_one_is_refused(source: Path, tmp_path: Path) -> None:
    ids = load_tokenizer(source).encode(TEXT, add_special_tokens=False).ids
    (tmp_path / "text.txt").write_text(TEXT)
    assert tokenized(source, tmp_path / "text.txt", samples=1, length=len(ids) + 1).tokens == len(ids) + 1
    with pytest.raises(DataError, match=rf"too short(.|\n)*found: {len(ids):,} tokens(.|\n)*--samples or --length"):
        tokenized(source, tmp_path / "text.txt", samples=1, length=len(ids) + 2)


def test_conversations_are_packed_as_for_calibration(source: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}. {TEXT[:200]}"}]} for i in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(dataset=str(tmp_path / "chat.jsonl"), samples=5, max_length=20, micro_batch=2, seed=0)
    assert tokenized(source, tmp_path / "chat.jsonl").digest == load_calibration(spec, load_tokenizer(source)).digest


def test_held_out_text_of_the_reference_is_preferred_to_its_calibration_samples(source: Path, tmp_path: Path) -> None:
    folder = only(source, tmp_path / "a", "tokenizer.json", "chat_samples.jsonl")
    assert "chat_samples.jsonl" in tokenized(folder, None).source
    (folder / "heldout.txt").write_text(TEXT)
    assert "heldout.txt" in tokenized(folder, None).source
    (folder / "heldout.jsonl").write_text(json.dumps({"text": TEXT}))
    assert "heldout.jsonl" in tokenized(folder, None, samples=1).source


def test_no_text_at_all_is_refused_with_what_to_do(source: Path, tmp_path: Path) -> None:
    folder = only(source, tmp_path / "a", "tokenizer.json")
    with pytest.raises(DataError, match=r"no text to evaluate on(.|\n)*--data"):
        tokenized(folder, None)


def test_a_reference_without_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    folder = only(source, tmp_path / "a", "chat_samples.jsonl")
    with pytest.raises(DataError, match="no tokenizer"):
        tokenized(folder, None)


def test_an_artifact_with_other_ids_is_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (source / "tokenizer.json").read_text()
    parsed = json.loads(text)
    vocab = parsed["model"]["vocab"]
    a, b = (token for token in list(vocab)[-2:])
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(parsed))
    with pytest.raises(DataError, match="2 tokens have another id"):
        tokenized(source, None, other)
    (other / "tokenizer.json").write_text(json.dumps(json.loads(text)))
    tokenized(source, None, other)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00 no text"])
def test_a_text_that_cannot_be_read_is_refused(source: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError, match="evaluation data cannot be read"):
        tokenized(source, tmp_path / "text.txt")


def test_conversations_that_are_too_short_are_refused_in_the_words_of_the_command(source: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"text": "Short."}))
    with pytest.raises(DataError, match=r"The evaluation data is too short(.|\n)*--samples or --length"):
        tokenized(source, tmp_path / "chat.jsonl")


@pytest.mark.parametrize("value", [{"samples": 0}, {"length": 3}, {"micro_batch": 0}])
def test_numbers_that_make_no_sense_are_usage(value: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(value)).replace("_", "-")):
        DataRequest(**{"file": None, "samples": 1, "length": 8, "micro_batch": 1, **value})


# ------------------------------------------------------------------------------------------------ the command's words


def said(source: Path, *options: object) -> str:
    """What `dsv4q eval` of a checkpoint against itself says on stderr when it refuses the data."""
    line = ["eval", source, "--reference", source, "--device", "cpu", "-q", "--samples", 2, "--length", 32, *options]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        main([str(word) for word in line])
    assert stopped.value.code == 1
    return errors.getvalue()


ROBOT = {"messages": [{"role": "user", "content": "How many?"}, {"role": "robot", "content": "Three."}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "The evaluation data is empty\n  where: FILE\n  expected: at least one row\n"),
        (
            b'{"prompt": "calibration"}',
            "The evaluation data has no column that can be used\n  where: FILE, line 1\n  expected: messages or text\n"
            "  found: prompt\n",
        ),
        (b"{calibration", "The evaluation data is not valid JSON\n  where: FILE, line 1\n  found: Expecting property"),
        (b'{"text": "\xff"}', "The evaluation data is not UTF-8\n  where: FILE, line 1\n  found: 'utf-8' codec can't"),
        (
            b'{"text": "\\ud800"}',
            "A row has half a surrogate pair in its text\n  where: FILE, line 1\n  expected: valid Unicode\n",
        ),
        (
            json.dumps(ROBOT).encode(),
            "A message has an unknown role\n  where: FILE, line 1: messages[1].role\n"
            "  expected: system, user or assistant\n  found: 'robot'\n",
        ),
        (
            b'{"text": "calibration.samples"}',
            "The evaluation data is too short\n  where: FILE\n  expected: 2 samples of 32 tokens = 64 tokens\n"
            "  found: 0 full samples, 17 tokens from 1 conversations, each sample beginning with a fresh one\n"
            "  next: give more data, or lower --samples or --length\n",
        ),
    ],
)
def test_the_command_speaks_of_its_options_and_names_the_data_by_its_own_path(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, text: str
) -> None:
    file = tmp_path / "calibration" / "x.jsonl"
    file.parent.mkdir()
    file.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    found = said(source, "--data", "calibration/x.jsonl")
    assert text.replace("FILE", str(file)) in found
    assert "evaluation/" not in found


def test_the_command_names_a_data_set_that_is_not_there_by_its_own_path(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = said(source, "--data", "calibration/none.jsonl")
    assert (
        f"There is no such data set\n  where: {tmp_path / 'calibration' / 'none.jsonl'}\n  expected: a JSONL" in found
    )


def test_a_saved_data_set_of_several_splits_is_refused_with_a_way_that_the_command_knows(
    source: Path, tmp_path: Path
) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([{"text": TEXT}] * 5)
    DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match="several splits") as caught:
        tokenized(source, tmp_path / "set")
    assert (caught.value.expected, caught.value.found) == ("the folder of one split", "train, test")
    assert caught.value.hint == "name the folder of one of those found: --data FOLDER/SPLIT"
    assert tokenized(source, tmp_path / "set" / "test").tokens == 100
