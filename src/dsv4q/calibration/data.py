"""Calibration data: where rows come from, how a conversation becomes tokens, which tokens share a batch.

Everything here is a function of the DataSpec, the rows and the tokenizer: no clock, no rank, no cache.

Rows: a JSONL or JSON file, a folder of parquet/JSON/JSONL files, a `datasets.save_to_disk` folder, or a hub id. A
row has `messages` (a list of {role, content}) or, if it has none, `text`.
Order: a Fisher-Yates shuffle of the row numbers, driven by `random.Random(seed).random()`, whose sequence Python
promises to keep in later versions.
Packing: padding tokens would enter the activation statistics, so there are none. A sample begins with a fresh
conversation and is filled with the following ones; what does not fit is cut off. Each sample has exactly
`max_length` tokens. Only rows that are used are read and checked.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv4q.errors import DataError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THINK_END = "<think>", "</think>"

CHAT_MODES = ("chat", "thinking")
COLUMNS = ("messages", "text")
FILE_TYPES = (".jsonl", ".json", ".parquet")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class DataSpec:
    """What calibration data a config asks for.

    Raises:
        DataError: a number below 1 (the seed: below 0), an unknown chat mode.
    """

    dataset: str
    """Hub id, folder or file; a relative path starts at `base` of the functions below, else at the current folder."""
    split: str | None
    """Split of a hub dataset or a folder. A single file has none, and there it has no effect."""
    samples: int
    max_length: int
    """Tokens of each sample."""
    micro_batch: int
    """Samples of each batch; the last one may have fewer."""
    seed: int
    chat_mode: str
    """`chat` or `thinking`, see `encode_chat`."""

    def __post_init__(self) -> None:
        for key, least in (("samples", 1), ("max_length", 1), ("micro_batch", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise DataError(
                    "The calibration cannot have this value",
                    where=f"calibration.{key}",
                    expected=f"at least {least}",
                    found=getattr(self, key),
                )
        _check_mode(self.chat_mode)

    @property
    def tokens(self) -> int:
        return self.samples * self.max_length


@dataclass(frozen=True)
class CalibrationData:
    """Tokenized batches, the same for every rank and every run of one config."""

    batches: tuple[torch.Tensor, ...]
    """Each int64 [micro_batch, max_length], the last one possibly with fewer rows. No padding."""
    tokens: int
    conversations_used: int
    digest: str
    """sha256 over the shape and the little-endian int64 ids of each batch, in order."""
    source: str
    """Where the rows came from, for the report."""


def encode_chat(messages: Sequence[Mapping[str, Any]], mode: str) -> str:
    """Text of one conversation, special tokens included, as DeepSeek-V4 wants it (the release has no Jinja template).

    BOS; the bare text of a system message; `<｜User｜>` + text; `<｜Assistant｜>` + thought + text + EOS.
    The thought is `</think>` in chat mode, `<think>` + reasoning_content (may be absent) + `</think>` in thinking
    mode.

    Raises:
        DataError: unknown mode or role, no message at all, a message of the wrong form.
    """
    _check_mode(mode)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(
            "This is not a conversation",
            where="messages",
            expected="a non-empty list of {role, content}",
            found=repr(messages)[:120],
        )
    return BOS + "".join(_encode_message(message, f"messages[{i}]", mode) for i, message in enumerate(messages))


def _encode_message(message: Mapping[str, Any], where: str, mode: str) -> str:
    if not isinstance(message, Mapping):
        raise DataError("This is not a message", where=where, expected="{role, content}", found=repr(message)[:120])
    role, content, thought = message.get("role"), message.get("content"), message.get("reasoning_content")
    if role not in ("system", "user", "assistant"):
        raise DataError(
            "A message has an unknown role",
            where=f"{where}.role",
            expected="system, user or assistant",
            found=repr(role),
        )
    for key, value, right in (
        ("content", content, isinstance(content, str)),
        ("reasoning_content", thought, thought is None or isinstance(thought, str)),
    ):
        if not right:
            raise DataError(
                "A message has no text", where=f"{where}.{key}", expected="a string", found=repr(value)[:120]
            )
    if role == "system":
        return f"{content}"
    if role == "user":
        return f"{USER}{content}"
    return f"{ASSISTANT}{THINK + (thought or '') if mode == 'thinking' else ''}{THINK_END}{content}{EOS}"


def _check_mode(mode: str) -> None:
    if mode not in CHAT_MODES:
        raise DataError(
            "There is no such chat mode", where="calibration.chat_mode", expected=" or ".join(CHAT_MODES), found=mode
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, exactly as its tokenizer.json has it: no network, no code of the folder.

    Raises:
        DataError: tokenizer.json is absent or broken, or a token of the chat encoding is not one token in it.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    hint = "copy tokenizer.json and tokenizer_config.json of the release into this folder"
    if not file.is_file():
        raise DataError("The checkpoint has no tokenizer", where=file, hint=hint)
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError("The tokenizer cannot be read", where=file, found=error, hint=hint) from error
    tokenizer = _parse_tokenizer(Tokenizer, text, file)
    for token in (BOS, EOS, USER, ASSISTANT, THINK, THINK_END):
        number = tokenizer.token_to_id(token)
        if number is None or tokenizer.encode(token, add_special_tokens=False).ids != [number]:
            raise DataError(
                "The tokenizer lacks a token of the DeepSeek-V4 chat encoding", where=file, expected=token, hint=hint
            )
    return tokenizer


def load_calibration(
    spec: DataSpec, tokenizer: Tokenizer, base: Path | None = None, vocab_size: int | None = None
) -> CalibrationData:
    """Read, shuffle, encode, tokenize and pack the samples of `spec`.

    Args:
        spec: what to read.
        tokenizer: from `load_tokenizer`.
        base: folder at which a relative dataset path starts; the current folder if None.
        vocab_size: number of rows of the model's embedding; ids are checked against it if given.

    Raises:
        DataError: the data set is absent, unreadable, empty, too short or lacks the column or the split; a row that
            was needed is malformed; a token id is outside the model's vocabulary.
    """
    import torch

    rows = _open(spec, base)
    conversations = _Conversations(rows, spec, tokenizer)
    samples = list(_pack(conversations, spec))
    if vocab_size is not None:
        _check_ids(samples, vocab_size)
    digest = hashlib.sha256()
    batches = []
    for start in range(0, spec.samples, spec.micro_batch):
        batch = samples[start : start + spec.micro_batch]
        digest.update(f"{len(batch)}x{spec.max_length}:".encode())
        for sample in batch:
            digest.update(_little_endian(sample))
        batches.append(torch.tensor([sample.tolist() for sample in batch], dtype=torch.int64))
    return CalibrationData(
        tuple(batches), spec.tokens, conversations.used, digest.hexdigest(), f"{rows.name}, {len(rows)} rows"
    )


def check_data(spec: DataSpec, base: Path | None = None) -> None:
    """Cheap early check: a local data set exists, can be read, is not empty and has the column and the split.

    It reads the first row or the schema of each file, never all rows. Of a hub id only the form is checked.

    Raises:
        DataError: see above.
    """
    path = _locate(spec, base)
    if path is None:
        return
    if _is_saved(path):
        _check_saved(path, spec.split)
        return
    for file in _files(path, spec.split):
        _row_file(file).check()


class _Rows(Protocol):
    """Rows by number."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def row(self, i: int) -> object: ...
    def where(self, i: int) -> str: ...


class _RowFile(_Rows, Protocol):
    def check(self) -> None:
        """Raise DataError if the file is empty or its first row or schema lacks the column."""


def _pack(conversations: _Conversations, spec: DataSpec) -> Iterator[array[int]]:
    """Samples of exactly `max_length` token ids."""
    stream = iter(conversations)
    for done in range(spec.samples):
        sample = array("q")
        while len(sample) < spec.max_length:
            ids = next(stream, None)
            if ids is None:
                raise DataError(
                    "The calibration data is too short",
                    where=conversations.rows.name,
                    expected=f"{spec.samples} samples of {spec.max_length} tokens = {spec.tokens} tokens",
                    found=f"{done} full samples, {done * spec.max_length + len(sample)} tokens "
                    f"from {conversations.used} conversations, each sample beginning with a fresh one",
                    hint="give more data, or lower calibration.samples or calibration.max_length",
                )
            sample.extend(ids)
        yield sample[: spec.max_length]


class _Conversations:
    """Token ids of each conversation, in shuffled order; rows with blank `text` are passed over."""

    def __init__(self, rows: _Rows, spec: DataSpec, tokenizer: Tokenizer) -> None:
        self.rows, self.spec, self.tokenizer = rows, spec, tokenizer
        self.used = 0

    def __iter__(self) -> Iterator[array[int]]:
        for i in _shuffled(len(self.rows), self.spec.seed):
            text = _row_text(self.rows.row(i), self.rows.where(i), self.spec.chat_mode)
            if text:
                self.used += 1
                yield array("q", self.tokenizer.encode(text, add_special_tokens=False).ids)


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Numbers 0 … count-1 in the order of a forward Fisher-Yates shuffle; only what is taken is computed."""
    rng = random.Random(seed)
    moved: dict[int, int] = {}
    for i in range(count):
        j = i + int(rng.random() * (count - i))
        chosen, displaced = moved.get(j, j), moved.pop(i, i)
        if j != i:
            moved[j] = displaced
        yield chosen


def _row_text(row: object, where: str, mode: str) -> str:
    """Text of a row with its special tokens; empty if the row has nothing but blank text."""
    if not isinstance(row, Mapping):
        raise DataError("A row is not an object", where=where, expected="messages or text", found=repr(row)[:120])
    if row.get("messages") is not None:
        try:
            text = encode_chat(row["messages"], mode)
        except DataError as error:
            place = f"{where}: {error.where}"
            raise DataError(error.what, where=place, expected=error.expected, found=error.found) from error
    else:
        _check_columns(list(row), where)
        plain = row.get("text")
        if not isinstance(plain, str):
            raise DataError("A row has no text", where=f"{where}: text", expected="a string", found=repr(plain)[:120])
        text = f"{BOS}{plain}{EOS}" if plain.strip() else ""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError("A row has half a surrogate pair in its text", where=where, expected="valid Unicode")
    return text


def _check_columns(columns: Sequence[str], where: str | Path) -> None:
    if not any(column in columns for column in COLUMNS):
        raise DataError(
            "The calibration data has no column that can be used",
            where=where,
            expected=" or ".join(COLUMNS),
            found=", ".join(map(str, columns)) or "no column",
        )


def _empty(where: str | Path) -> DataError:
    return DataError("The calibration data is empty", where=where, expected="at least one row")


def _unreadable(where: str | Path, error: BaseException) -> DataError:
    return DataError("The calibration data cannot be read", where=where, found=error)


def _check_ids(samples: Sequence[array[int]], vocab_size: int) -> None:
    highest = max(max(sample) for sample in samples)
    if highest >= vocab_size:
        raise DataError(
            "The tokenizer and the model do not fit: a token id is outside the model's vocabulary",
            expected=f"ids below vocab_size = {vocab_size}",
            found=f"token id {highest}",
            hint="use the tokenizer of the same release",
        )


def _little_endian(ids: array[int]) -> bytes:
    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    return ids.tobytes()


def _parse_tokenizer(cls: type[Tokenizer], text: str, file: Path) -> Tokenizer:
    try:
        tokenizer = cls.from_str(text)
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises a bare Exception, and nothing else, for a bad file
            raise
        raise DataError("The tokenizer is broken", where=file, found=error) from error
    tokenizer.no_truncation()  # the file may carry both settings, and either would break the packing
    tokenizer.no_padding()
    return tokenizer


def _open(spec: DataSpec, base: Path | None) -> _Rows:
    path = _locate(spec, base)
    if path is None:
        rows: _TableRows | _FileRows = _hub_rows(spec)
    elif _is_saved(path):
        rows = _saved_rows(path, spec.split)
    else:
        rows = _FileRows(path, _files(path, spec.split))
        if spec.split is not None and path.is_file():
            rows.name += f" (a file has no splits: {spec.split} has no effect)"
    if not len(rows):
        raise _empty(rows.name)
    return rows


def _locate(spec: DataSpec, base: Path | None) -> Path | None:
    """The local file or folder that `spec.dataset` names, or None if it is a hub id."""
    name = spec.dataset
    try:
        path = Path(name).expanduser()
        path = path if base is None else base / path
        if name and path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(name, error) from error
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
    for suffix in (".parquet", ".jsonl", ".json"):
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


def _row_file(path: Path) -> _RowFile:
    if path.suffix.lower() == ".parquet":
        return _ParquetFile(path)
    if path.suffix.lower() == ".json" and _starts_with_bracket(path):
        return _JsonFile(path)
    return _JsonLinesFile(path)


def _starts_with_bracket(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError as error:
        raise _unreadable(path, error) from error


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
        self.path, self.name = path, str(path)
        self._offsets, self._lines = array("q"), array("q")

    def _scan(self) -> None:
        offset = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._lines.append(number)
                    offset += len(line)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def __len__(self) -> int:
        if not self._offsets:
            self._scan()
        return len(self._offsets)

    def row(self, i: int) -> object:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offsets[i])
                line = file.readline()
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return _parse_json(line, self.where(i))

    def where(self, i: int) -> str:
        return f"{self.path}, line {self._lines[i]}"

    def check(self) -> None:
        try:
            with self.path.open("rb") as file:
                number, line = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (0, b""))
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if not number:
            raise _empty(self.path)
        where = f"{self.path}, line {number}"
        _row_text(_parse_json(line, where), where, "chat")


class _JsonFile:
    """One JSON list of objects, held in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        rows = _parse_json(raw, path)
        self._rows = rows if isinstance(rows, list) else []

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> object:
        return self._rows[i]

    def where(self, i: int) -> str:
        return f"{self.path}, row {i} from 0"

    def check(self) -> None:
        if not self._rows:
            raise _empty(self.path)
        _row_text(self._rows[0], self.where(0), "chat")


class _ParquetFile:
    """A parquet file; one row group is held in memory, and only its columns that are used."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet  # type: ignore[import-untyped]

        self.path, self.name = path, str(path)
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        self._columns = [column for column in COLUMNS if column in self._file.schema_arrow.names]
        sizes = (self._file.metadata.row_group(g).num_rows for g in range(self._file.metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def row(self, i: int) -> object:
        _check_columns(self._file.schema_arrow.names, self.path)
        group = bisect_right(self._starts, i) - 1
        if self._group[0] != group:
            try:
                self._group = (group, self._file.read_row_group(group, columns=self._columns))
            except (OSError, ValueError) as error:
                raise _unreadable(self.path, error) from error
        return self._group[1].slice(i - self._starts[group], 1).to_pylist()[0]

    def where(self, i: int) -> str:
        return f"{self.path}, row {i} from 0"

    def check(self) -> None:
        if not len(self):
            raise _empty(self.path)
        _check_columns(self._file.schema_arrow.names, self.path)


class _TableRows:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, table: Any, name: str) -> None:
        self._table, self.name = table, name
        _check_columns(table.column_names, name)

    def __len__(self) -> int:
        return len(self._table)

    def row(self, i: int) -> object:
        return self._table[i]

    def where(self, i: int) -> str:
        return f"{self.name}, row {i} from 0"


_SAVED_DICT, _SAVED_TABLE = "dataset_dict.json", "dataset_info.json"


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
    _check_columns(list(features or ()), path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _choose_split(names: Sequence[str], split: str | None, where: str | Path) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        raise _no_split(where, split, names)
    return split


def _saved_rows(path: Path, split: str | None) -> _TableRows:
    from datasets import DatasetDict, load_from_disk

    _check_saved(path, split)
    try:
        table = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if isinstance(table, DatasetDict):
        split = _choose_split(list(table), split, path)
        return _TableRows(table[split], f"{path} ({split})")
    if split is not None and table.split is not None and str(table.split) != split:
        raise _no_split(path, split, [str(table.split)])
    return _TableRows(table, str(path))


def _hub_rows(spec: DataSpec) -> _TableRows:
    import httpx
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        table = load_dataset(spec.dataset, split=spec.split)
    except (DatasetsError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise DataError(
            "The data set cannot be loaded from the hub",
            where=f"{spec.dataset}, split {spec.split}",
            found=f"{type(error).__name__}: {error}",
            hint="download it where there is a network and give its folder as calibration.dataset",
        ) from error
    if isinstance(table, DatasetDict):
        split = _choose_split(list(table), spec.split, spec.dataset)
        return _TableRows(table[split], f"{spec.dataset} ({split})")
    return _TableRows(table, f"{spec.dataset} ({spec.split})")
