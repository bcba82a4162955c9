"""The one sink of all output: data and results to stdout, talk and progress to stderr.

| | human | json | quiet |
|---|---|---|---|
| `data` | - | stdout, one JSON object | - |
| `print`, `table` | stdout | - | - |
| `talk`, `progress` | stderr | - | - |
| `warn` | stderr | stderr | - |
| `error` | stderr | stdout, `{"error": ...}` | stderr |

Nothing is cut off or coloured when a stream is not a terminal, so what is piped can be searched. rich is imported
only to draw on a terminal. Control characters in a text (a damaged header may hold any name) are shown as `\\x1b`.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dsv4q.errors import Dsv4qError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PLAIN_INTERVAL = 30.0
"""Seconds between two progress lines where there is no terminal to draw a bar on."""

_CONTROL = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
_NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?( ?(%|[a-zA-Zµ]{1,4}))?")


class Mode(StrEnum):
    """Whom the output is for."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


def human_bytes(n: int) -> str:
    """Bytes in decimal units (1 GB = 1e9 bytes), two decimals: `181.27 GB`. Below 1 kB exact: `17 B`."""
    value = float(n)
    if abs(n) < 1000:
        return f"{n} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if abs(round(value, 2)) < 1000:
            return f"{value:.2f} {unit}"
    return f"{value / 1000:.2f} TB"


def bytes_of(text: str) -> int:
    """Bytes that a person means: `16GB`, `16 GiB`, `1.5TB`, `16000000000`; G alone is GB.

    Raises:
        ValueError: another text, or nothing above zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([kMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    power = 0 if found is None or found[2] is None else "kmgt".index(found[2].lower()) + 1
    nbytes = 0 if found is None else int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if nbytes <= 0:
        raise ValueError(f"{text!r} is no number of bytes such as 16GB or 24GiB")
    return nbytes


def human_seconds(s: float) -> str:
    """Seconds as people say them, two parts at most: `0.42 s`, `3.1 s`, `42 s`, `12 min 05 s`, `2 h 07 min`."""
    for limit, digits in ((1, 2), (10, 1), (60, 0)):
        if round(s, digits) < limit:
            return f"{s:.{digits}f} s"
    whole = round(s)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(s / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Work done out of a known total. `advance` may be called from any thread."""

    def __init__(
        self,
        description: str,
        total: int,
        unit: str,
        show: Callable[[Progress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = _shown(description)
        self.total = total
        self.unit = unit
        self.done = 0
        self._show = show
        self._clock = clock
        self._start = self._moved = clock()
        self._skipped = 0
        self._lock = threading.Lock()

    def advance(self, n: int) -> None:
        """Count `n` more units as done."""
        with self._lock:
            self.done += n
            self._moved = self._clock()
            self._show(self)

    def skip(self, n: int) -> None:
        """Count `n` units that an earlier run did: they are done, but say nothing about the speed of this one."""
        with self._lock:
            self._skipped += n
            self.done += n
            self._show(self)

    def describe(self, text: str) -> None:
        """Say what is being worked on now."""
        with self._lock:
            self.description = _shown(text)
            self._show(self)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def remaining(self) -> float | None:
        """Seconds left for the whole total at this run's average speed; None before anything was done."""
        worked = self.done - self._skipped
        if worked <= 0:
            return None
        left = max(self.total - self.done, 0) * (self._moved - self._start) / worked
        return max(left - (self._clock() - self._moved), 0.0)

    @property
    def amount(self) -> str:
        """`3.80 GB of 181.27 GB`, or `3 of 43 layers`."""
        if self.unit == "B":
            return f"{human_bytes(self.done)} of {human_bytes(self.total)}"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    @property
    def time_left(self) -> str:
        """The remaining time for people; empty while unknown."""
        left = self.remaining
        return "" if left is None else f"{human_seconds(left)} left"

    @property
    def percent(self) -> str:
        """Whole per cent, rounded down: 100 % means done."""
        return f"{100 if self.total <= 0 else min(100 * self.done // self.total, 100):3d} %"

    def line(self) -> str:
        """All of it as one plain line."""
        parts = [
            f"{self.description}: {self.percent.strip()}",
            self.amount,
            human_seconds(self.elapsed),
            self.time_left,
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Console:
    """Where every command writes. The streams are looked up at each call, so redirection works."""

    mode: Mode = Mode.HUMAN

    def data(self, obj: Mapping[str, Any]) -> None:
        """Print the command's one result for machines, in json mode only.

        Keys keep their order. A path becomes its string; NaN and the infinities, which JSON lacks, become null.

        Raises:
            TypeError: a value has no JSON form.
        """
        if self.mode == Mode.JSON:
            # To a program one line, so that several runs make JSON Lines; to a reader an indented object.
            indent = 2 if sys.stdout.isatty() else None
            # A stream that is not UTF-8 gets JSON's own escapes.
            escape = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
            _write(sys.stdout, json.dumps(_finite(obj), ensure_ascii=escape, indent=indent, allow_nan=False))

    def print(self, text: str = "") -> None:
        """Print a result for people."""
        if self.mode == Mode.HUMAN:
            _write(sys.stdout, _shown(text))

    def talk(self, text: str) -> None:
        """Say what is going on."""
        if self.mode == Mode.HUMAN:
            _write(sys.stderr, _shown(text))

    def warn(self, what: str | Dsv4qError) -> None:
        """Say what deserves attention but stops nothing."""
        text = what if isinstance(what, str) else what.text()
        if self.mode != Mode.QUIET:
            _write(sys.stderr, _paint(sys.stderr, "warning:", "33") + f" {_shown(text)}")

    def error(self, error: Dsv4qError) -> None:
        """Report the error that ends the command."""
        if self.mode == Mode.JSON:
            self.data({"error": error.as_dict()})
        else:
            _write(sys.stderr, _paint(sys.stderr, "error:", "1;31") + f" {_shown(error.text())}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table for people; columns of numbers are aligned to the right.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        if self.mode != Mode.HUMAN:
            return
        cells = [[_cell(value) for value in row] for row in rows]
        if any(len(row) != len(columns) for row in cells):
            raise ValueError(f"table {title!r}: every row needs {len(columns)} cells")
        right = [bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))]
        draw = _rich_table if sys.stdout.isatty() else _plain_table
        draw(_shown(title), [_shown(column) for column in columns], cells, right)

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "B") -> Iterator[Progress]:
        """Show how far long work is and when all of it will be done.

        A bar on a terminal; elsewhere a line each `PLAIN_INTERVAL` seconds; nothing in json and quiet mode.

        Args:
            description: what is being done.
            total: units in the whole work, those done by an earlier run included.
            unit: `B` for bytes, else a plural noun.
        """
        if self.mode != Mode.HUMAN:
            yield Progress(description, total, unit, lambda _: None)
        elif sys.stderr.isatty():
            bar, progress = _rich_bar(description, total, unit)
            with bar:
                yield progress
        else:
            yield Progress(description, total, unit, _PlainLines())


class _PlainLines:
    """Prints a progress line when the last one is `PLAIN_INTERVAL` seconds old."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.elapsed - self._last >= PLAIN_INTERVAL:
            self._last = progress.elapsed
            _write(sys.stderr, _shown(progress.line()))


def _shown(text: str) -> str:
    return text.translate(_CONTROL)


def _paint(stream: TextIO, text: str, code: str) -> str:
    colour = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    # A file name may hold bytes that are no text, a terminal may not be UTF-8: neither may end in a traceback.
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _shown(str(value)).replace("\n", " ")


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    _write(sys.stdout, title)
    for line in lines:
        pairs = zip(line, widths, right, strict=True)
        _write(sys.stdout, "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in pairs).rstrip())


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, numbers in zip(columns, right, strict=True):
        # A name too long for the terminal goes on in the next line; rich would else end it with an ellipsis.
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold", no_wrap=numbers)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    RichConsole(file=sys.stdout, highlight=False).print(table)


def _rich_bar(description: str, total: int, unit: str) -> tuple[RichProgress, Progress]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    def column(what: str) -> TextColumn:
        # Asked anew at each redraw, so that the time left counts down between two steps.
        return TextColumn(f"{{task.fields[progress].{what}}}", markup=False)

    bar = RichProgress(
        column("description"),
        BarColumn(bar_width=None),
        column("percent"),
        column("amount"),
        TimeElapsedColumn(),
        column("time_left"),
        console=RichConsole(file=sys.stderr),
        expand=True,
        redirect_stdout=sys.stdout.isatty(),  # a redirected stdout must stay what the command printed
    )
    progress = Progress(description, total, unit, lambda p: bar.update(task, completed=p.done))
    task = bar.add_task("", total=max(total, 1), progress=progress)
    return bar, progress


class Running:
    """The console of the running command, for `main` to report an error with."""

    console = Console()


def console_of(as_json: bool, quiet: bool, speaks: Callable[[], bool] = lambda: True) -> Console:
    """The console of a command with these options.

    Args:
        speaks: whether this process does; of several ranks the first one, while all name their errors.
    """
    Running.console = Console(Mode.JSON if as_json else Mode.QUIET if quiet else Mode.HUMAN)
    if not speaks():
        Running.console = Console(Mode.QUIET)
    return Running.console


def open_standard_streams() -> None:
    """Occupy descriptors 0 to 2 where the caller closed them: the next file opened would get their numbers, and
    with them whatever a library prints."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
