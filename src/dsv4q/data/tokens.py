"""Calibration data: how a conversation becomes tokens, in which order, and which tokens share a batch.

Everything here is a function of the DataSpec, the rows and the tokenizer: no clock, no rank, no cache.

Rows (`rows.py`, `files.py`): each has `messages` (a list of {role, content}) or, if it has none, `text`.
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
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.data.files import Rows, check_columns
from dsv4q.data.rows import first_rows, open_rows
from dsv4q.data.spec import DataSpec, Wording
from dsv4q.errors import DataError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THINK_END = "<think>", "</think>"

ROLES = ("system", "user", "assistant")
CHAT_MODES = ("chat", "thinking")


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
    if role not in ROLES:
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

    rows = open_rows(spec, base)
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
    for row, where in first_rows(spec, base):
        _row_text(row, where, "chat", spec.words)


def _pack(conversations: _Conversations, spec: DataSpec) -> Iterator[array[int]]:
    """Samples of exactly `max_length` token ids."""
    stream = iter(conversations)
    for done in range(spec.samples):
        sample = array("q")
        while len(sample) < spec.max_length:
            ids = next(stream, None)
            if ids is None:
                raise DataError(
                    f"The {spec.words.purpose} data is too short",
                    where=conversations.rows.name,
                    expected=f"{spec.samples} samples of {spec.max_length} tokens = {spec.tokens} tokens",
                    found=f"{done} full samples, {done * spec.max_length + len(sample)} tokens "
                    f"from {conversations.used} conversations, each sample beginning with a fresh one",
                    hint=f"give more data, or lower {spec.words.samples} or {spec.words.max_length}",
                )
            sample.extend(ids)
        yield sample[: spec.max_length]


class _Conversations:
    """Token ids of each conversation, in shuffled order; rows with nothing but blank text are passed over."""

    def __init__(self, rows: Rows, spec: DataSpec, tokenizer: Tokenizer) -> None:
        self.rows, self.spec, self.tokenizer = rows, spec, tokenizer
        self.used = 0

    def __iter__(self) -> Iterator[array[int]]:
        for i in _shuffled(len(self.rows), self.spec.seed):
            text = _row_text(self.rows.row(i), self.rows.where(i), self.spec.chat_mode, self.spec.words)
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


def _row_text(row: object, where: str, mode: str, words: Wording) -> str:
    """Text of a row with its special tokens; empty if the row has nothing but blank text."""
    if not isinstance(row, Mapping):
        raise DataError("A row is not an object", where=where, expected="messages or text", found=repr(row)[:120])
    check_columns(list(row), where, words)
    messages, plain = row.get("messages"), row.get("text")
    if messages is not None:
        try:
            text = "" if _is_blank(messages) else encode_chat(messages, mode)
        except DataError as error:
            raise error.but(where=f"{where}: {error.where}") from error.__cause__
    else:
        plain = "" if plain is None and "messages" in row else plain
        if not isinstance(plain, str):
            raise DataError("A row has no text", where=f"{where}: text", expected="a string", found=repr(plain)[:120])
        text = f"{BOS}{plain}{EOS}" if plain.strip() else ""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError("A row has half a surrogate pair in its text", where=where, expected="valid Unicode")
    return text


def _is_blank(messages: object) -> bool:
    """Whether a conversation has no message, or nothing but blank ones."""
    return isinstance(messages, list) and all(
        isinstance(m, Mapping)
        and m.get("role") in ROLES
        and not m.get("reasoning_content")
        and isinstance(m.get("content"), str)
        and not m["content"].strip()
        for m in messages
    )


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
