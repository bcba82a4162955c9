"""Errors as values: one re-dressed is the same error in text, args, cause and origin; of many the first one speaks."""

from __future__ import annotations

import os
import subprocess
import traceback
from pathlib import Path

import pytest

from dsv4q.errors import DataError, Dsv4qError, SourceError, VerificationFailed, command, first_problem

ERROR = SourceError("A shard is gone", where="a", expected="b", found="c", hint="look")


def refuse() -> None:
    try:
        Path("/nowhere/at/all").read_bytes()
    except OSError as error:
        raise DataError("It cannot be read", where="here") from error


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"what": "x"}, "what"), ({"where": "x"}, "where"), ({"expected": "x"}, "expected"), ({"found": "x"}, "found"),
        ({"hint": "x"}, "next"),
    ],
)  # fmt: skip
def test_but_changes_one_detail_and_keeps_the_others(change: dict[str, str], key: str) -> None:
    changed = ERROR.but(**change)
    assert changed.as_dict() == {**ERROR.as_dict(), key: "x"}
    assert str(changed) == changed.text() and changed.args == (changed.text(),)


def test_but_leaves_the_error_itself_as_it_was() -> None:
    before = (str(ERROR), ERROR.as_dict())
    ERROR.but("Something else", where="there")
    assert (str(ERROR), ERROR.as_dict()) == before


def test_but_keeps_the_type_and_its_exit_code() -> None:
    changed = VerificationFailed("It differs").but(where="there")
    assert type(changed) is VerificationFailed and changed.exit_code == 3


def test_a_redressed_error_shows_its_origin_and_its_cause_once() -> None:
    with pytest.raises(DataError) as caught:
        try:
            refuse()
        except DataError as error:
            raise error.but(where="there") from error.__cause__
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("dsv4q.errors.DataError") == 1 and "in refuse" in shown and "FileNotFoundError" in shown


def test_of_one_problem_nothing_more_is_told() -> None:
    assert first_problem([ERROR], "somebody lists them") is ERROR


@pytest.mark.parametrize(
    ("hint", "told"), [("look", "look; 2 more problem(s); see X"), (None, "2 more problem(s); see X")]
)
def test_of_several_problems_the_first_tells_of_the_others(hint: str | None, told: str) -> None:
    problems: list[Dsv4qError] = [SourceError("One", where="a", hint=hint), DataError("Two"), DataError("Three")]
    first = first_problem(problems, "see X")
    assert (type(first), first.what, first.where, first.hint) == (SourceError, "One", "a", told)
    assert problems[0].hint == hint


def test_a_caller_may_count_the_others_in_words_of_its_own() -> None:
    assert first_problem([ERROR, ERROR], "see X", lambda more: f"and {more}:").hint == "look; and 1: see X"


@pytest.mark.parametrize("path", ["plain", "two words", "it's", os.fsdecode(b"caf\xe9"), "\x1b[0m$(rm)", "tab\tline\n"])
def test_a_command_is_read_by_the_shell_as_it_was_meant(path: str) -> None:
    line = os.fsencode(f"printf %s {command(path)}")
    assert subprocess.run(["bash", "-c", line], capture_output=True).stdout == os.fsencode(path)
