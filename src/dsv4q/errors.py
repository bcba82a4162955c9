"""Typed refusals. Each says what is wrong, where, what was expected, what was found and what to do next.

Exit codes: 1 refused or failed for a named reason, 2 usage, 3 verification found differences.
A plain Python exception that reaches the command line is a defect of ours, never a user's mistake.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar


def command(*words: object) -> str:
    """A command line that can be pasted into bash, whatever bytes are in a path."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if word.replace("\n", "").replace("\t", "").isprintable():
        return shlex.quote(word)
    bytes_or_ascii = (chr(b) if 32 <= b < 127 and chr(b) not in "'\\" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(bytes_or_ascii)}'"


class Dsv4qError(Exception):
    """Base of every error meant for a user.

    Args:
        what: the fact, one sentence without a final full stop.
        where: file, tensor, config key or command line option concerned.
        expected: what would have been right.
        found: what is there.
        hint: what the user can do next.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        expected: object | None = None,
        found: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.hint = hint
        super().__init__(self.text())

    def but(
        self,
        what: str | None = None,
        *,
        where: str | Path | None = None,
        expected: object | None = None,
        found: object | None = None,
        hint: str | None = None,
    ) -> Self:
        """The same error with these details in place of its own; None keeps what it has.

        Its cause and its traceback go along. So `raise error.but(where=...)` shows where it first arose, once.
        """
        changed = type(self)(
            self.what if what is None else what,
            where=self.where if where is None else where,
            expected=self.expected if expected is None else expected,
            found=self.found if found is None else found,
            hint=self.hint if hint is None else hint,
        )
        changed.__cause__ = self.__cause__
        return changed.with_traceback(self.__traceback__)

    @property
    def kind(self) -> str:
        """Name of the error type, as `--json` prints it."""
        return type(self).__name__

    def text(self) -> str:
        """Plain text for people: the fact, then one line for each detail that is known."""
        lines = [self.what]
        for label, value in (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("next", self.hint),
        ):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | None]:
        """The same facts for `--json`."""
        return {
            "kind": self.kind,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "next": self.hint,
        }


class UsageError(Dsv4qError):
    """The command line itself makes no sense."""

    exit_code = 2


class ConfigError(Dsv4qError):
    """The YAML config: unknown key, wrong value, contradiction."""


class RecipeError(ConfigError):
    """The recipe inside the config: targets, schemes, ignore."""


class SourceError(Dsv4qError):
    """The source checkpoint: index, shard, header, tensor, config.json."""


class DataError(Dsv4qError):
    """The calibration data: absent, empty, too short, wrong column."""


class DeviceError(Dsv4qError):
    """No such device, or it has too little memory."""


class RankError(Dsv4qError):
    """Another rank of a job on several GPUs is gone, or the recipe is not for several."""


class DiskError(Dsv4qError):
    """Too little disk, or the disk failed."""


class OutputError(Dsv4qError):
    """The output folder: not ours, inside the source, in use by another run."""


class ResumeError(Dsv4qError):
    """The unfinished run in the output folder is of another source, config, data or version."""


class CalibrationError(Dsv4qError):
    """Calibration gave something unusable: non-finite activations, a scale that is not positive."""


class WeightError(Dsv4qError):
    """A tensor's values cannot be used: NaN or Inf in the source."""


class Interrupted(Dsv4qError):
    """The user stopped the run."""


class VerificationFailed(Dsv4qError):
    """The artifact differs from what it must be."""

    exit_code = 3


Problem = TypeVar("Problem", bound=Dsv4qError)


def first_problem(
    problems: Sequence[Problem], see: str, others: Callable[[int], str] = "{} more problem(s);".format
) -> Problem:
    """The first problem, to be raised; its hint tells how many more there are and what lists them.

    Args:
        problems: at least one; they stay as they are.
        see: what lists them all, the end of a sentence that `others` begins with their number.
        others: that beginning.
    """
    first, more = problems[0], len(problems) - 1
    if not more:
        return first
    also = f"{others(more)} {see}"
    return first.but(hint=f"{first.hint}; {also}" if first.hint else also)
