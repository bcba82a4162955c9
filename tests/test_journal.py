"""The output folder: whose it is, who is at it, what is done."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dsv4q.checkpoint.files import INDEX, REPORT, WORK, is_finished, write_atomic
from dsv4q.checkpoint.journal import Journal, first_difference
from dsv4q.checkpoint.output import check_output
from dsv4q.errors import OutputError, ResumeError

IDENTITY: dict[str, Any] = {"config": {"seed": 42, "shards": [1, 2]}, "source": {"a.safetensors": "0f"}}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def opened(out: Path, identity: dict[str, Any] | None = None, resume: bool = True) -> Journal:
    journal = Journal.open(out, identity or IDENTITY, resume=resume)
    journal.close()
    return journal


def started(out: Path, *blocks: str) -> Path:
    """An unfinished run with these blocks done; returns its journal file."""
    journal = Journal.open(out, IDENTITY, resume=True)
    for block in blocks:
        journal.finish_block(block, {"digest": block.upper()})
    journal.close()
    return out / WORK / "journal.jsonl"


# ----------------------------------------------------------------------------------------------- small files


def test_a_small_file_is_whole_readable_for_all_and_leaves_no_partial(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "a.json", b"first")
        write_atomic(tmp_path / "a.json", b"second")
    finally:
        os.umask(before)
    assert snapshot(tmp_path) == {"a.json": b"second"}
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_small_file_that_fails_leaves_the_old_one_and_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "a.json", b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a.json", b"new")
    monkeypatch.undo()
    assert snapshot(tmp_path) == {"a.json": b"old"}


# ----------------------------------------------------------------------------------------------- whose folder


@pytest.mark.parametrize("out", [".", "source", "source/out", "source/../source/out", "link/out"])
def test_an_output_that_overlaps_the_source_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(OutputError, match="overlap"):
        check_output(tmp_path / out, tmp_path / "source")


def test_a_source_that_is_a_file_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="overlap"):
        check_output(tmp_path / "out", tmp_path / "config.json")


@pytest.mark.parametrize("name", ["source-2", "out"])
def test_a_folder_beside_the_source_is_fine(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    check_output(tmp_path / name, tmp_path / "source")
    (tmp_path / name).mkdir()
    check_output(tmp_path / name, tmp_path / "source")


def test_an_output_that_is_a_file_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="not a folder"):
        check_output(tmp_path / "out", tmp_path / "source")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "model-00001-of-00002.safetensors", INDEX, REPORT])
def test_a_folder_with_foreign_files_is_refused_by_name_and_untouched(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("precious")
    with pytest.raises(OutputError) as caught:
        check_output(out, tmp_path / "source")
    assert caught.value.found == name and snapshot(out) == {name: b"precious"}


def test_an_unfinished_run_and_a_finished_artifact_pass_for_ours(tmp_path: Path) -> None:
    started(tmp_path / "unfinished")
    (tmp_path / "finished").mkdir()
    for name in (INDEX, REPORT):
        (tmp_path / "finished" / name).write_text("{}")
    for name in ("unfinished", "finished"):
        check_output(tmp_path / name, tmp_path / "source")
    assert is_finished(tmp_path / "finished") and not is_finished(tmp_path / "unfinished")


# ----------------------------------------------------------------------------------------------- the journal


def test_finished_blocks_are_there_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    started(tmp_path, "embed", "layers.0")
    done = opened(tmp_path).done
    assert done == {b: {"block": b, "digest": b.upper()} for b in ("embed", "layers.0")}


def test_the_identity_of_an_unfinished_run_can_be_asked_for(tmp_path: Path) -> None:
    assert Journal.identity_of(tmp_path) is None
    started(tmp_path, "embed")
    assert Journal.identity_of(tmp_path) == IDENTITY


def test_an_identity_of_tuples_is_the_one_of_lists_that_it_became_in_the_file(tmp_path: Path) -> None:
    started(tmp_path, "embed")
    assert opened(tmp_path, {**IDENTITY, "config": {"seed": 42, "shards": (1, 2)}}).done


def test_another_identity_is_refused_with_key_and_both_values(tmp_path: Path) -> None:
    file = started(tmp_path, "embed")
    before = file.read_bytes()
    with pytest.raises(ResumeError) as caught:
        opened(tmp_path, {**IDENTITY, "config": {"seed": 43, "shards": [1, 2]}})
    error = caught.value
    assert "another config" in str(error) and str(error.where).endswith("config.seed")
    assert (error.expected, error.found) == ("42", "43") and file.read_bytes() == before


def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path: Path) -> None:
    file = started(tmp_path, "embed")
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"block": "layers.0", "di')
    assert set(opened(tmp_path).done) == {"embed"} and file.read_bytes() == whole


def test_a_torn_first_line_is_a_run_that_never_began(tmp_path: Path) -> None:
    file = started(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    assert opened(tmp_path, {"other": 1}).done == {} and Journal.identity_of(tmp_path) == {"other": 1}


DAMAGED = [
    b"{}\nnot json\n",
    b"\x00\x00\x00\n",
    b'{}\n{"digest": "x"}\n',
    b"{}\n[1]\n",
    b"\xff\xfe\n{}\n",
    b"{}\n\n{}\n",
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_journal_is_named_and_kept(tmp_path: Path, data: bytes) -> None:
    file = started(tmp_path, "embed")
    file.write_bytes(data)
    with pytest.raises(ResumeError, match="damaged") as caught:
        opened(tmp_path)
    assert caught.value.where == str(file) and "--no-resume" in str(caught.value) and file.read_bytes() == data


@pytest.mark.parametrize("data", DAMAGED)
def test_starting_over_gets_rid_of_a_damaged_journal(tmp_path: Path, data: bytes) -> None:
    file = started(tmp_path, "embed")
    file.write_bytes(data)
    assert opened(tmp_path, resume=False).done == {} and Journal.identity_of(tmp_path) == IDENTITY


def test_starting_over_drops_shards_index_and_streams_of_the_run_before(tmp_path: Path) -> None:
    started(tmp_path, "embed")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors.partial", INDEX, f"{WORK}/streams.x"]
    for name in names:
        (tmp_path / name).write_text("old")
    assert opened(tmp_path, resume=False).done == {}
    assert set(snapshot(tmp_path)) == {f"{WORK}/journal.jsonl", f"{WORK}/lock"}


def test_a_record_that_the_system_cuts_short_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:7])))
    file = started(tmp_path, "embed", "head")
    monkeypatch.undo()
    assert [json.loads(line).get("block") for line in file.read_text().splitlines()] == [None, "embed", "head"]


def test_a_second_run_at_once_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, IDENTITY, resume=True)
    journal.finish_block("embed", {})
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="Another run is writing"):
        Journal.open(tmp_path, {"other": 1}, resume=False)
    assert snapshot(tmp_path) == before
    journal.close()


def test_a_lock_file_that_the_run_before_took_away_guards_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def taken_away(handle: int) -> os.stat_result:
        (tmp_path / WORK / "lock").unlink(missing_ok=True)
        return real(handle)

    monkeypatch.setattr(os, "fstat", taken_away)
    with pytest.raises(OutputError, match="Another run"):
        Journal.open(tmp_path, IDENTITY, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_an_artifact_that_was_finished_meanwhile_is_not_started_over(tmp_path: Path, resume: bool) -> None:
    shard = "model-00001-of-00001.safetensors"
    for name in (INDEX, REPORT, shard):
        (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match="just finished"):
        Journal.open(tmp_path, IDENTITY, resume=resume)
    assert {INDEX, REPORT, shard} <= set(snapshot(tmp_path))


def test_removing_the_journal_leaves_the_artifact_alone(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, IDENTITY, resume=True)
    (tmp_path / WORK / "model").mkdir()
    (tmp_path / WORK / "model" / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    journal.remove()
    journal.close()
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_leftovers_of_a_finished_run_are_removed_and_may_be_absent(tmp_path: Path) -> None:
    started(tmp_path, "embed")
    for _ in range(2):
        Journal.remove_leftovers(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {"b": [1, 2]}}, {"a": {"b": (1, 2)}}, None),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ("a.c", "2", "3")),
        ({"a": 1}, {"a": 1, "b": "x"}, ("b", "null", '"x"')),
        ({"a": {"b": 1}}, {"a": None}, ("a", '{"b": 1}', "null")),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ("a", "1", "2")),
        ({"a": [1, 2]}, {"a": [2, 1]}, ("a", "[1, 2]", "[2, 1]")),
        ({"a": 1}, {"a": True}, ("a", "1", "true")),
        ({"a": "ü"}, {"a": "u"}, ("a", '"ü"', '"u"')),
    ],
)
def test_the_first_difference_is_told_by_its_dotted_key(
    before: dict[str, Any], now: dict[str, Any], found: tuple[str, str, str] | None
) -> None:
    assert first_difference(before, now) == found
