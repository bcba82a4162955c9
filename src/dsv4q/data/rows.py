"""Rows of a data set, read by number: where it lies, which of its files or splits is meant.

A data set is a JSONL, JSON or parquet file, a folder of such files, a `datasets.save_to_disk` folder, or a hub id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsv4q.data.files import (
    FILE_TYPES,
    FileRows,
    NumberedRows,
    Rows,
    check_columns,
    empty,
    read_json,
    reading,
    row_file,
)
from dsv4q.data.spec import DataSpec, Wording
from dsv4q.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SPLIT = re.compile(r"(train|test|valid|validation|val|dev|eval)([_-].*)?")
"""Names that tell a split from a file that is just called something."""
_SAVED_DICT, _SAVED_TABLE, _SAVED_STATE = "dataset_dict.json", "dataset_info.json", "state.json"


def open_rows(spec: DataSpec, base: Path | None = None) -> Rows:
    """The rows of a data set.

    Args:
        spec: of it, dataset and split.
        base: folder at which a relative path starts; the current folder if None.

    Raises:
        DataError: the data set is absent, unreadable, empty or lacks the column or the split. Each row that is read
            later can raise it, too.
    """
    path = _locate(spec, base)
    rows: Rows
    if path is None:
        rows = _hub_rows(spec)
    elif _is_saved(path):
        rows = _saved_rows(path, spec)
    else:
        rows = FileRows(path, _files(path, spec), spec.words)
        if spec.split is not None and path.is_file():
            rows.name += f" (a file has no splits: {spec.split} has no effect)"
    if not len(rows):
        raise empty(rows.name, spec.words)
    return rows


def first_rows(spec: DataSpec, base: Path | None = None) -> Iterator[tuple[object, str]]:
    """First row, and its place, of each JSON or JSONL file of a data set; of other forms only the schema is checked.

    Neither all rows nor the network nor a heavy import is needed. Of a hub id only the form is checked.

    Raises:
        DataError: as `open_rows`.
    """
    path = _locate(spec, base)
    if path is None:
        return
    if _is_saved(path):
        _check_saved(path, spec)
        return
    for file in _files(path, spec):
        yield from row_file(file, spec.words).first()


def _locate(spec: DataSpec, base: Path | None) -> Path | None:
    """The local file or folder of that name, or None if it is a hub id."""
    name = spec.dataset
    try:
        path = Path(name).expanduser()
        path = path if base is None else base / path
        if name and path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a home that nobody has is a RuntimeError
        raise DataError(f"The {spec.words.purpose} data cannot be read", where=name, found=error) from error
    if _HUB_ID.fullmatch(name) and not name.lower().endswith(FILE_TYPES):
        return None
    raise DataError(
        "There is no such data set",
        where=path,
        expected="a JSONL, JSON or parquet file, a folder of them, a save_to_disk folder, or a hub id",
        hint="a relative path starts at the folder named above" if not Path(name).is_absolute() else None,
    )


def _files(path: Path, spec: DataSpec) -> list[Path]:
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
    if spec.split is None:
        return files
    chosen = [file for file in files if spec.split in _splits_of(file, path)]
    if not chosen:
        raise _no_split(path, spec, sorted({name for file in files for name in _splits_of(file, path)}))
    return chosen


def _splits_of(file: Path, folder: Path) -> set[str]:
    """Names of splits that a data file of a folder may be of."""
    return {re.split(r"-\d", file.stem)[0], *file.relative_to(folder).parent.parts}


def split_of_other_data(spec: DataSpec, base: Path | None = None) -> str | None:
    """The split to read of data that stands in for a config's: `spec.split` if the data has it; else None if there is
    nothing to choose. Of a hub id, `spec.split`.

    Raises:
        DataError: the data is absent or unreadable, or has several splits and not this one.
    """
    path = _locate(spec, base)
    if path is None:
        return spec.split
    names: list[str] = []
    if _is_saved(path):
        names = _saved_splits(path, spec.words) or []
    elif path.is_dir():
        files = _files(path, spec.model_copy(update={"split": None}))
        there = {name for file in files for name in _splits_of(file, path)}
        names = sorted(name for name in there if name == spec.split or _SPLIT.fullmatch(name))
    if spec.split in names:
        return spec.split
    if len(names) > 1:
        raise _no_split(path, spec, names)
    return None


def _no_split(where: str | Path, spec: DataSpec, names: Sequence[str]) -> DataError:
    return DataError(
        "The data set has no such split" if spec.split else "The data set has several splits and none is chosen",
        where=where,
        expected=spec.split or spec.words.split,
        found=", ".join(names),
        hint=spec.words.choose_split,
    )


def _choose_split(names: Sequence[str], spec: DataSpec, where: str | Path) -> str:
    if spec.split is None and len(names) == 1:
        return names[0]
    if spec.split is None or spec.split not in names:
        raise _no_split(where, spec, names)
    return spec.split


# ------------------------------------------------------------------------------------------------ datasets


def _table_rows(table: Any, name: str, words: Wording) -> NumberedRows:
    """Rows of a `datasets.Dataset`."""
    check_columns(table.column_names, name, words)
    return NumberedRows(table, name)


def _is_saved(path: Path) -> bool:
    """Is this a folder that `datasets.save_to_disk` wrote?"""
    return (path / _SAVED_DICT).is_file() or ((path / _SAVED_STATE).is_file() and (path / _SAVED_TABLE).is_file())


def _saved_splits(path: Path, words: Wording) -> list[str] | None:
    """Splits of a saved dictionary of tables; None for a single table."""
    if not (path / _SAVED_DICT).is_file():
        return None
    parsed = read_json(path / _SAVED_DICT, words)
    names = parsed.get("splits") if isinstance(parsed, dict) else None
    return names if isinstance(names, list) else []


def _check_saved(path: Path, spec: DataSpec) -> str | None:
    """What load_from_disk would find, from the JSON files alone: importing `datasets` takes seconds.

    Returns:
        The split, where there are several.
    """
    names, split = _saved_splits(path, spec.words), None
    if names is not None:
        split = _choose_split(names, spec, path)
        path = path / split
    parsed = read_json(path / _SAVED_TABLE, spec.words)
    features = parsed.get("features") if isinstance(parsed, dict) else None
    check_columns(list(features or ()), path, spec.words)
    state = read_json(path / _SAVED_STATE, spec.words)
    if isinstance(state, dict) and state.get("_data_files") == []:  # load_from_disk takes the first one's schema
        raise empty(path, spec.words)
    return split


def _saved_rows(path: Path, spec: DataSpec) -> NumberedRows:
    from datasets import load_from_disk

    split = _check_saved(path, spec)
    with reading(path, spec.words):
        table = load_from_disk(str(path if split is None else path / split))
    if split is not None:
        return _table_rows(table, f"{path} ({split})", spec.words)
    if spec.split is not None and table.split is not None and str(table.split) != spec.split:
        raise _no_split(path, spec, [str(table.split)])
    return _table_rows(table, str(path), spec.words)


def _hub_rows(spec: DataSpec) -> NumberedRows:
    import httpx
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    dataset, split = spec.dataset, spec.split
    try:
        table = load_dataset(dataset, split=split)
    except (DatasetsError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise DataError(
            "The data set cannot be loaded from the hub",
            where=f"{dataset}, split {split}",
            found=f"{type(error).__name__}: {error}",
            hint=f"download it where there is a network and give its folder as {spec.words.dataset}",
        ) from error
    if isinstance(table, DatasetDict):
        split = _choose_split(list(table), spec, dataset)
        table = table[split]
    return _table_rows(table, f"{dataset} ({split})", spec.words)
