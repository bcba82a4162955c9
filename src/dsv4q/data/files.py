"""Files of rows: JSON Lines, a JSON list, parquet. Only rows that are asked for are parsed.

A row has `messages` or, if it has none, `text`; what a row says is not checked here.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from dsv4q.data.spec import Wording
from dsv4q.errors import DataError

COLUMNS = ("messages", "text")
FILE_TYPES = (".parquet", ".jsonl", ".json")
"""Of a folder with files of several types, the first of these is read."""


class Rows(Protocol):
    """Rows by number."""

    name: str
    """Of the data set, for messages and the report."""

    def __len__(self) -> int: ...
    def row(self, i: int) -> object: ...
    def where(self, i: int) -> str:
        """Place of row `i`, for messages."""


class RowFile(Rows, Protocol):
    """Rows of one file."""

    def first(self) -> Iterator[tuple[object, str]]:
        """The first row and its place; a file with a schema has that checked, and gives no row.

        Raises:
            DataError: the file is empty, or its schema lacks the column.
        """


def row_file(path: Path, words: Wording) -> RowFile:
    """The rows of a file of one of the `FILE_TYPES`; lines or a list in a `.json` file is told by its first byte.

    Raises:
        DataError: unreadable, or a list that is not valid JSON. Each row that is read later can raise it, too.
    """
    if path.suffix.lower() == ".parquet":
        return ParquetFile(path, words)
    if path.suffix.lower() == ".json" and _starts_with_bracket(path, words):
        return JsonList(path, words)
    return JsonLines(path, words)


def check_columns(columns: Sequence[str], where: str | Path, words: Wording) -> None:
    """Raise DataError if neither `messages` nor `text` is among the columns."""
    if not any(column in columns for column in COLUMNS):
        raise DataError(
            f"The {words.purpose} data has no column that can be used",
            where=where,
            expected=" or ".join(COLUMNS),
            found=", ".join(map(str, columns)) or "no column",
        )


def empty(where: str | Path, words: Wording) -> DataError:
    return DataError(f"The {words.purpose} data is empty", where=where, expected="at least one row")


@contextmanager
def reading(where: str | Path, words: Wording) -> Iterator[None]:
    """What goes wrong with a file inside becomes a DataError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"The {words.purpose} data cannot be read", where=where, found=error) from error


def parse_json(raw: bytes, where: str | Path, words: Wording) -> object:
    """The value of a JSON text.

    Raises:
        DataError: not UTF-8 or not JSON.
    """
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"The {words.purpose} data is not UTF-8", where=where, found=error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"The {words.purpose} data is not valid JSON", where=where, found=error) from error


def read_json(path: Path, words: Wording) -> Any:
    """The value of a JSON file; raises as `parse_json`, or if the file cannot be read."""
    with reading(path, words):
        raw = path.read_bytes()
    return parse_json(raw, path, words)


def _starts_with_bracket(path: Path, words: Wording) -> bool:
    with reading(path, words), path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


class NumberedRows:
    """Rows of anything with a length that is indexed by number: a list, a `datasets.Dataset`."""

    def __init__(self, rows: Any, name: str) -> None:
        self.name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> object:
        return self._rows[i]

    def where(self, i: int) -> str:
        return f"{self.name}, row {i} from 0"


class JsonList(NumberedRows):
    """One JSON list of objects, held in memory."""

    def __init__(self, path: Path, words: Wording) -> None:
        super().__init__(read_json(path, words), str(path))
        self._words = words

    def first(self) -> Iterator[tuple[object, str]]:
        if not len(self):
            raise empty(self.name, self._words)
        yield self.row(0), self.where(0)


class ParquetFile:
    """A parquet file; one row group is held in memory, and only its columns that are used."""

    def __init__(self, path: Path, words: Wording) -> None:
        import pyarrow.parquet  # type: ignore[import-untyped]

        self.name = str(path)
        self._words = words
        with reading(path, words):
            self._file = pyarrow.parquet.ParquetFile(path)
        self._columns = [column for column in COLUMNS if column in self._file.schema_arrow.names]
        sizes = (self._file.metadata.row_group(g).num_rows for g in range(self._file.metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def row(self, i: int) -> object:
        check_columns(self._file.schema_arrow.names, self.name, self._words)
        group = bisect_right(self._starts, i) - 1
        if self._group[0] != group:
            with reading(self.name, self._words):
                self._group = (group, self._file.read_row_group(group, columns=self._columns))
        return self._group[1].slice(i - self._starts[group], 1).to_pylist()[0]

    def where(self, i: int) -> str:
        return f"{self.name}, row {i} from 0"

    def first(self) -> Iterator[tuple[object, str]]:
        if not len(self):
            raise empty(self.name, self._words)
        check_columns(self._file.schema_arrow.names, self.name, self._words)
        return iter(())


class JsonLines:
    """One JSON object per line; blank lines are passed over. Memory: 16 bytes per line, whatever their length."""

    def __init__(self, path: Path, words: Wording) -> None:
        self.name = str(path)
        self._path, self._words = path, words
        self._offsets, self._numbers = array("q"), array("q")

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number from 1, offset in bytes and text of each line that is not blank."""
        offset = 0
        with reading(self._path, self._words), self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)

    def __len__(self) -> int:
        if not self._offsets:
            for number, offset, _ in self._lines():
                self._numbers.append(number)
                self._offsets.append(offset)
        return len(self._offsets)

    def row(self, i: int) -> object:
        with reading(self._path, self._words), self._path.open("rb") as file:
            file.seek(self._offsets[i])
            line = file.readline()
        return parse_json(line, self.where(i), self._words)

    def where(self, i: int) -> str:
        return f"{self.name}, line {self._numbers[i]}"

    def first(self) -> Iterator[tuple[object, str]]:
        for number, _, line in self._lines():
            where = f"{self.name}, line {number}"
            yield parse_json(line, where, self._words), where
            return
        raise empty(self.name, self._words)


class FileRows:
    """Rows of several files, one file after the other."""

    def __init__(self, path: Path, files: Sequence[Path], words: Wording) -> None:
        self.name = str(path) if len(files) == 1 else f"{path} ({len(files)} files)"
        self._files = [row_file(file, words) for file in files]
        self._starts = list(accumulate(map(len, self._files), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, i: int) -> object:
        file, inside = self._place(i)
        return file.row(inside)

    def where(self, i: int) -> str:
        file, inside = self._place(i)
        return file.where(inside)

    def _place(self, i: int) -> tuple[RowFile, int]:
        file = bisect_right(self._starts, i) - 1
        return self._files[file], i - self._starts[file]
