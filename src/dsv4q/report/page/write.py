"""`dsv4q report`, and the end of every run of quantize: the page as a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.files import PAGE, utf8, write_atomic
from dsv4q.errors import OutputError, SourceError
from dsv4q.report.page.inputs import read_inputs
from dsv4q.report.page.page import GENERATOR, build_page
from dsv4q.report.page.record import Gap
from dsv4q.verify.judge import verify
from dsv4q.verify.result import VerifyResult


@dataclass(frozen=True)
class PageRequest:
    """One page as the user asked for it."""

    artifact: Path
    out: Path | None = None
    """Where to; ARTIFACT/report.html if None."""
    deep: bool = False
    """Verify every value, not only headers."""
    saved: Path | None = None
    """A file with what `verify-shards --json` printed."""


@dataclass(frozen=True)
class Written:
    """What became of it."""

    page: Path
    nbytes: int
    gaps: list[str]
    """What the page marks as missing."""
    checked: VerifyResult | None
    """The verification of now; None if there could be none."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        checked = None if self.checked is None else self.checked.as_dict()
        return {"page": str(self.page), "bytes": self.nbytes, "gaps": self.gaps, "verification": checked}


def write_report(request: PageRequest, progress: Callable[[str, int, int], None] | None = None) -> Written:
    """Verify the artifact, build the page, write it.

    Args:
        progress: called with a label, bytes done and bytes in all, where the data is read.

    Raises:
        OutputError: no report.json of quantize, of a format that this version reads; `out` is something else already,
            or in no folder; `saved` is no verification of this artifact.
        SourceError: every value is to be verified, and the artifact cannot be read.
    """
    out = request.out or request.artifact / PAGE
    _check_out(out)
    # Everything cheap is looked at before every value is.
    read_inputs(request.artifact, None, request.saved)
    checked = None
    try:
        checked = verify(request.artifact, source=None, deep=request.deep, progress=progress)
        found: dict[str, Any] | Gap = checked.as_dict()
    except SourceError as error:
        if request.deep:
            raise
        found = Gap(f"When this page was made: {error.what} ({error.where})")
    page, gaps = build_page(read_inputs(request.artifact, found, request.saved))
    data = utf8(page)
    write_atomic(out, data)
    return Written(out, len(data), gaps, checked)


def write_missing_page(artifact: Path) -> None:
    """The page of a run that has ended, unless it is there.

    Raises:
        OutputError: as `write_report`.
    """
    if not (artifact / PAGE).exists():
        write_report(PageRequest(artifact))


def _check_out(out: Path) -> None:
    """Only a page of ours is overwritten."""
    if not out.parent.is_dir():
        raise OutputError("There is no such folder to write the page into", where=out.parent)
    if out.exists() and not (out.is_file() and _is_page(out)):
        raise OutputError(
            "Something else is there already",
            where=out,
            expected=f"a new file, or an older {PAGE}",
            found="a folder" if out.is_dir() else "a file that is not such a page",
            hint="choose another name with -o; nothing was touched",
        )


def _is_page(path: Path) -> bool:
    with path.open("rb") as stream:
        return f'content="{GENERATOR}"'.encode() in stream.read(1000)
