"""Rows of calibration data: files, folders, `datasets.save_to_disk` folders and hub ids, read by number.

A data set is a JSONL or JSON file, a folder of parquet/JSON/JSONL files, a `datasets.save_to_disk` folder, or a hub id.
A row has `messages` or, if it has none, `text`. Only rows that are asked for are parsed; what they say is not checked
here.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from dsv4q.errors import DataError

COLUMNS = ("messages", "text")
FILE_TYPES = (".parquet", ".jsonl", ".json")
"""Of a folder with files of several types, the first of these is read."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SAVED_DICT, _SAVED_TABLE = "dataset_dict.json", "dataset_info.json"


class Rows(Protocol):
    """Rows by number."""

    @property
    def name(self) -> str:
        """Of the data set, for messages and the report."""

    def __len__(self) -> int: ...
    def row(self, i: int) -> object: ...
    def where(self, i: int) -> str:
        """Place of row `i`, for messages."""


def open_rows(dataset: str, split: str | None, base: Path | None = None) -> Rows:
    """The rows of a data set.

    Args:
        dataset: hub id, folder or file.
        split: of a hub id or a folder; a single file has none.
        base: folder at which a relative path starts; the current folder if None.

    Raises:
        DataError: the data set is absent, unreadable, empty or lacks the column or the split. Each row that is read
            later can raise it, too.
    """
    path = _locate(dataset, base)
    if path is None:
        rows: _TableRows | _FileRows = _hub_rows(dataset, split)
    elif _is_saved(path):
        rows = _saved_rows(path, split)
    else:
        rows = _FileRows(path, _files(path, split))
        if split is not None and path.is_file():
            rows.name += f" (a file has no splits: {split} has no effect)"
    if not len(rows):
        raise _empty(rows.name)
    return rows


def first_rows(dataset: str, split: str | None, base: Path | None = None) -> Iterator[tuple[object, str]]:
    """First row, and its place, of each JSON or JSONL file of a data set; of other forms only the schema is checked.

    Neither all rows nor the network nor a heavy import is needed. Of a hub id only the form is checked.

    Raises:
        DataError: as `open_rows`.
    """
    path = _locate(dataset, base)
    if path is None:
        return
    if _is_saved(path):
        _check_saved(path, split)
        return
    for file in map(_row_file, _files(path, split)):
        yield from file.first()


def check_columns(columns: Sequence[str], where: str | Path) -> None:
    """Raise DataError if neither `messages` nor `text` is among the columns."""
    if not any(column in columns for column in COLUMNS):
        raise DataError(
            "The calibration data has no column that can be used",
            where=where,
            expected=" or ".join(COLUMNS),
            found=", ".join(map(str, columns)) or "no column",
        )


def _empty(where: str | Path) -> DataError:
    return DataError("The calibration data is empty", where=where, expected="at least one row")


@contextmanager
def _reading(where: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError("The calibration data cannot be read", where=where, found=error) from error


# ------------------------------------------------------------------------------------------------ where data lies


def _locate(name: str, base: Path | None) -> Path | None:
    """The local file or folder of that name, or None if it is a hub id."""
    try:
        path = Path(name).expanduser()
        path = path if base is None else base / path
        if name and path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError("The calibration data cannot be read", where=name, found=error) from error
    if _HUB_ID.fullmatch(name) and not name.lower().endswith(FILE_TYPES):
        return None
    raise DataError(
        "There is no such data set",
        where=path,
        expected="a JSONL, JSON or parquet file, a folder of them, a save_to_disk folder, or a hub id",
        hint="a relative path starts at the folder named above" if not Path(name).is_absolute() else None,
    )


def _files(path: Path, split: str | None) -> list[Path]:
    """Data files of a folder (or the file itself), sorted by path: of one type, parquet before JSONL before JSON.

    The split of a file is a folder on its way, or its name up to a part number: `data/train_sft-00000-of-00003`.
    """
    if path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise DataError("This is no data file", where=path, expected=" or ".join(FILE_TYPES), found=path.suffix)
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in FILE_TYPES and file.is_file()]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    for suffix in FILE_TYPES:
        files = [file for file in found if file.suffix.lower() == suffix]
        if files:
            break
    else:
        raise DataError("The folder holds no data file", where=path, expected=" or ".join(FILE_TYPES))
    if split is None:
        return files
    splits = {file: {re.split(r"-\d", file.stem)[0], *file.relative_to(path).parent.parts} for file in files}
    chosen = [file for file in files if split in splits[file]]
    if not chosen:
        raise _no_split(path, split, sorted({name for names in splits.values() for name in names}))
    return chosen


def _no_split(where: str | Path, split: str | None, names: Sequence[str]) -> DataError:
    return DataError(
        "The data set has no such split" if split else "The data set has several splits and none is chosen",
        where=where,
        expected=split or "calibration.split",
        found=", ".join(names),
        hint="set calibration.split to one of those found",
    )


def _choose_split(names: Sequence[str], split: str | None, where: str | Path) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        raise _no_split(where, split, names)
    return split


# ------------------------------------------------------------------------------------------------ files


class _RowFile(Protocol):
    def __len__(self) -> int: ...
    def row(self, i: int) -> object: ...
    def where(self, i: int) -> str: ...
    def first(self) -> Iterator[tuple[object, str]]:
        """The first row and its place; a file with a schema has that checked, and gives no row.

        Raises DataError if the file is empty or its schema lacks the column.
        """


def _row_file(path: Path) -> _RowFile:
    if path.suffix.lower() == ".parquet":
        return _ParquetFile(path)
    if path.suffix.lower() == ".json" and _starts_with_bracket(path):
        return _JsonFile(path)
    return _JsonLinesFile(path)


def _starts_with_bracket(path: Path) -> bool:
    with _reading(path), path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _parse_json(raw: bytes, where: str | Path) -> object:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError("The calibration data is not UTF-8", where=where, found=error) from error
    except (ValueError, RecursionError) as error:
        raise DataError("The calibration data is not valid JSON", where=where, found=error) from error


class _FileRows:
    """Rows of several files, one file after the other."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.name = str(path) if len(files) == 1 else f"{path} ({len(files)} files)"
        self._files = [_row_file(file) for file in files]
        self._starts = list(accumulate(map(len, self._files), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, i: int) -> object:
        file = bisect_right(self._starts, i) - 1
        return self._files[file].row(i - self._starts[file])

    def where(self, i: int) -> str:
        file = bisect_right(self._starts, i) - 1
        return self._files[file].where(i - self._starts[file])


class _JsonLinesFile:
    """One JSON object per line; blank lines are passed over. Memory: 16 bytes per line, whatever their length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._lines = array("q"), array("q")

    def _scan(self) -> None:
        offset = 0
        with _reading(self.path), self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        if not self._offsets:
            self._scan()
        return len(self._offsets)

    def row(self, i: int) -> object:
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(self._offsets[i])
            line = file.readline()
        return _parse_json(line, self.where(i))

    def where(self, i: int) -> str:
        return f"{self.path}, line {self._lines[i]}"

    def first(self) -> Iterator[tuple[object, str]]:
        with _reading(self.path), self.path.open("rb") as file:
            number, line = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (0, b""))
        if not number:
            raise _empty(self.path)
        where = f"{self.path}, line {number}"
        yield _parse_json(line, where), where


class _JsonFile:
    """One JSON list of objects, held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = _parse_json(_read(path), path)
        self._rows = rows if isinstance(rows, list) else []

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> object:
        return self._rows[i]

    def where(self, i: int) -> str:
        return f"{self.path}, row {i} from 0"

    def first(self) -> Iterator[tuple[object, str]]:
        if not self._rows:
            raise _empty(self.path)
        yield self._rows[0], self.where(0)


class _ParquetFile:
    """A parquet file; one row group is held in memory, and only its columns that are used."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet  # type: ignore[import-untyped]

        self.path = path
        with _reading(path):
            self._file = pyarrow.parquet.ParquetFile(path)
        self._columns = [column for column in COLUMNS if column in self._file.schema_arrow.names]
        sizes = (self._file.metadata.row_group(g).num_rows for g in range(self._file.metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def row(self, i: int) -> object:
        check_columns(self._file.schema_arrow.names, self.path)
        group = bisect_right(self._starts, i) - 1
        if self._group[0] != group:
            with _reading(self.path):
                self._group = (group, self._file.read_row_group(group, columns=self._columns))
        return self._group[1].slice(i - self._starts[group], 1).to_pylist()[0]

    def where(self, i: int) -> str:
        return f"{self.path}, row {i} from 0"

    def first(self) -> Iterator[tuple[object, str]]:
        if not len(self):
            raise _empty(self.path)
        check_columns(self._file.schema_arrow.names, self.path)
        return iter(())


def _read(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


# ------------------------------------------------------------------------------------------------ datasets


class _TableRows:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, table: Any, name: str) -> None:
        self._table, self.name = table, name
        check_columns(table.column_names, name)

    def __len__(self) -> int:
        return len(self._table)

    def row(self, i: int) -> object:
        return self._table[i]

    def where(self, i: int) -> str:
        return f"{self.name}, row {i} from 0"


def _is_saved(path: Path) -> bool:
    """Is this a folder that `datasets.save_to_disk` wrote?"""
    return (path / _SAVED_DICT).is_file() or ((path / "state.json").is_file() and (path / _SAVED_TABLE).is_file())


def _check_saved(path: Path, split: str | None) -> None:
    """What load_from_disk would find, from the JSON files alone: importing `datasets` takes seconds."""
    if (path / _SAVED_DICT).is_file():
        parsed = _parse_json(_read(path / _SAVED_DICT), path / _SAVED_DICT)
        names = parsed.get("splits") if isinstance(parsed, dict) else None
        path = path / _choose_split(names if isinstance(names, list) else [], split, path)
    parsed = _parse_json(_read(path / _SAVED_TABLE), path / _SAVED_TABLE)
    features = parsed.get("features") if isinstance(parsed, dict) else None
    check_columns(list(features or ()), path)


def _saved_rows(path: Path, split: str | None) -> _TableRows:
    from datasets import DatasetDict, load_from_disk

    _check_saved(path, split)
    with _reading(path):
        table = load_from_disk(str(path))
    if isinstance(table, DatasetDict):
        split = _choose_split(list(table), split, path)
        return _TableRows(table[split], f"{path} ({split})")
    if split is not None and table.split is not None and str(table.split) != split:
        raise _no_split(path, split, [str(table.split)])
    return _TableRows(table, str(path))


def _hub_rows(dataset: str, split: str | None) -> _TableRows:
    import httpx
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        table = load_dataset(dataset, split=split)
    except (DatasetsError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise DataError(
            "The data set cannot be loaded from the hub",
            where=f"{dataset}, split {split}",
            found=f"{type(error).__name__}: {error}",
            hint="download it where there is a network and give its folder as calibration.dataset",
        ) from error
    if isinstance(table, DatasetDict):
        split = _choose_split(list(table), split, dataset)
        return _TableRows(table[split], f"{dataset} ({split})")
    return _TableRows(table, f"{dataset} ({split})")
