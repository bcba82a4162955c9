"""The output folder of a run: whether it is ours to write, has room, and what is finished in it already."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.files import INDEX, PAGE, REPORT, WORK, is_finished
from dsv4q.checkpoint.journal import Journal, first_difference
from dsv4q.errors import DiskError, OutputError
from dsv4q.host import used_bytes


def check_output(out: Path, source: Path) -> None:
    """Refuse a folder that is not ours to write.

    Raises:
        OutputError: OUT is a file, holds foreign files, or lies inside the source (or the source inside it).
    """
    there, origin = out.resolve(), source.resolve()
    origin = origin.parent if origin.is_file() else origin
    if there == origin or there.is_relative_to(origin) or origin.is_relative_to(there):
        raise OutputError(
            "The output folder and the source overlap",
            where=out,
            expected="a folder outside the source",
            found=f"source {source}",
        )
    if out.exists() and not out.is_dir():
        raise OutputError("The output is not a folder", where=out)
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir() and not is_finished(out):
        raise OutputError(
            "The output folder is not empty and not an unfinished run of dsv4q",
            where=out,
            expected="a new or empty folder",
            found=", ".join(sorted(p.name for p in out.iterdir())[:5]),
            hint="choose another folder; nothing in this one was touched",
        )


def place_problem(out: Path) -> OutputError | None:
    """Whether the folder can be made, and written, as far as its nearest existing parent tells."""
    there = out.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return OutputError("The output folder cannot be made", where=out, expected="a folder", found=f"{there}, a file")
    if not os.access(there, os.W_OK | os.X_OK):
        return OutputError(
            "The output folder cannot be written", where=out, found=f"{there} is not writable by this user"
        )
    return None


def disk_problem(out: Path, needed: int, free: int | None) -> DiskError | None:
    """Whether `needed` bytes find room, what an unfinished run has written there already counted in."""
    written = used_bytes(out) if out.is_dir() else 0
    if free is None or free + written >= needed:
        return None
    return DiskError(
        "There is too little free disk for the artifact",
        where=out,
        expected=f"{needed:,} bytes",
        found=f"{free:,} bytes",
        hint="make room or choose an output folder on another disk",
    )


def already_there(out: Path, identity: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """A finished artifact is returned as it is if this very job made it, and refused otherwise; its report.

    Raises:
        OutputError: a finished artifact of another source, config, data or version; `resume` is false.
    """
    report = finished_report(out)
    if report is None:
        raise OutputError(
            "The output folder holds a checkpoint that dsv4q did not make",
            where=out,
            expected="a new or empty folder",
            found=f"{INDEX}, and a {REPORT} that is not ours",
            hint="choose another folder; nothing in this one was touched",
        )
    difference = first_difference(report["identity"], identity)
    if difference:
        key, before, now = difference
        raise OutputError(
            f"The output folder holds a finished artifact of another {key.partition('.')[0]}",
            where=f"{out}: {key}",
            expected=before,
            found=now,
            hint="choose another folder, or delete this artifact yourself",
        )
    if not resume:
        raise OutputError(
            "The output folder holds this very artifact, finished",
            where=out,
            expected="an unfinished run to start over, with --no-resume",
            hint="choose another folder, or delete this artifact yourself",
        )
    # Only the page comes after the index, so a crash can have left nothing but the work folder and a torn page.
    Journal.remove_leftovers(out)
    (out / f"{PAGE}.partial").unlink(missing_ok=True)
    return report


def finished_report(out: Path) -> dict[str, Any] | None:
    """The report of a finished run of ours in `out`, if there is one."""
    if not is_finished(out):
        return None
    try:
        report = json.loads((out / REPORT).read_bytes())
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and isinstance(report.get("identity"), dict) else None


def require_finished(path: Path, *, indexed: bool = False) -> None:
    """Refuse a folder in which a run of ours has not finished.

    Args:
        indexed: an index is wanted too, which a run writes last; small checkpoints of others may lack one.

    Raises:
        OutputError: it has not.
    """
    if (path / WORK).is_dir():
        found = WORK
    elif indexed and path.is_dir() and not (path / INDEX).is_file():
        found = f"no {INDEX}"
    else:
        return
    raise OutputError(
        "The artifact is not finished",
        where=path,
        expected=f"{INDEX}, which a run writes last",
        found=found,
        hint="finish it with the command that began it",
    )
