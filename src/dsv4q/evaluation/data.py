"""The text to evaluate on, as batches of token ids: conversations (JSONL, JSON, parquet) or one plain text.

Conversations and rows with `text` are encoded, shuffled and packed as for calibration (`data/tokens.py`), with a
fixed seed. A plain text is tokenized as a whole and cut into rows, each of which begins with BOS, as everything that
the model was trained on does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dsv4q.data.files import FILE_TYPES
from dsv4q.data.spec import DataSpec, Wording
from dsv4q.data.tokens import ASSISTANT, BOS, EOS, THINK_END, CalibrationData, load_calibration, load_tokenizer
from dsv4q.errors import DataError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULTS = ("heldout.jsonl", "heldout.txt", "chat_samples.jsonl")
"""Looked for in the reference's folder, in this order, when no data is named."""
LEAST_LENGTH = 4
"""Two draft steps need a token, its successor and the two that are drafted."""
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class DataRequest:
    """What the user asked for.

    Raises:
        UsageError: a number that is too small.
    """

    file: Path | None
    """None: the first of `DEFAULTS` that is there."""
    samples: int
    length: int
    """Tokens of each sample."""
    micro_batch: int
    """Samples that are computed at once."""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--samples", self.samples, 1),
            ("--length", self.length, LEAST_LENGTH),
            ("--micro-batch", self.micro_batch, 1),
        ):
            if value < least:
                raise UsageError(
                    "The evaluation cannot have this value", where=option, expected=f"at least {least}", found=value
                )


class EvaluationSpec(DataSpec):
    """Conversations to evaluate on. The user sets by options what a config sets for a calibration."""

    words: ClassVar[Wording] = Wording(
        purpose="evaluation",
        dataset="--data",
        samples="--samples",
        max_length="--length",
        split="the folder of one split",
        choose_split="name the folder of one of those found: --data FOLDER/SPLIT",
    )


def load_data(request: DataRequest, reference: Path, artifact: Path, vocab_size: int) -> CalibrationData:
    """Tokenized samples, with the tokenizer in the reference's folder.

    Raises:
        DataError: no tokenizer; no data, or too little; a tokenizer of another vocabulary than the model's or the
            artifact's.
    """
    tokenizer = load_tokenizer(reference)
    _check_same_tokenizer(tokenizer, reference, artifact)
    file = request.file if request.file is not None else _default(reference)
    if file.is_dir() or file.suffix.lower() in FILE_TYPES:
        return _conversations(request, file, tokenizer, vocab_size)
    return _plain_text(request, file, tokenizer, vocab_size)


def turn_ids(reference: Path) -> tuple[list[int], int]:
    """Ids with which an assistant's turn begins in chat mode, and the one with which it ends.

    Raises:
        DataError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(reference)
    begin: list[int] = tokenizer.encode(ASSISTANT + THINK_END, add_special_tokens=False).ids
    (end,) = tokenizer.encode(EOS, add_special_tokens=False).ids
    return begin, end


def _default(reference: Path) -> Path:
    for name in DEFAULTS:
        if (reference / name).is_file():
            return reference / name
    raise DataError(
        "There is no text to evaluate on",
        where=reference,
        expected=" or ".join(DEFAULTS),
        hint="name a file: --data FILE.jsonl (messages or text in each row) or --data FILE.txt",
    )


def _check_same_tokenizer(tokenizer: Tokenizer, reference: Path, artifact: Path) -> None:
    """The artifact's own tokenizer, if it has one, must give the same ids."""
    ours, theirs = reference / "tokenizer.json", artifact / "tokenizer.json"
    if not theirs.is_file() or ours.read_bytes() == theirs.read_bytes():
        return
    mine, other = tokenizer.get_vocab(), load_tokenizer(artifact).get_vocab()
    unequal = sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token))
    if unequal:
        raise DataError(
            "The two checkpoints have tokenizers of different vocabularies",
            where=theirs,
            expected=f"the ids of {ours}",
            found=f"{len(unequal):,} tokens have another id, such as {unequal[0]!r}",
            hint="compare an artifact with the checkpoint that it was made from",
        )


def _conversations(request: DataRequest, file: Path, tokenizer: Tokenizer, vocab_size: int) -> CalibrationData:
    spec = EvaluationSpec(
        dataset=str(file.absolute()),
        samples=request.samples,
        max_length=request.length,
        micro_batch=request.micro_batch,
        seed=0,
    )
    return load_calibration(spec, tokenizer, None, vocab_size=vocab_size)


def _plain_text(request: DataRequest, file: Path, tokenizer: Tokenizer, vocab_size: int) -> CalibrationData:
    import torch

    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError("The evaluation data cannot be read", where=file, found=error) from error
    wanted = request.samples * (request.length - 1)
    ids = _first_ids(text, wanted, tokenizer)
    if len(ids) < wanted:
        raise DataError(
            "The evaluation data is too short",
            where=file,
            expected=f"{request.samples} samples of {request.length} tokens = {wanted:,} tokens besides BOS",
            found=f"{len(ids):,} tokens",
            hint="give more data, or lower --samples or --length",
        )
    rows = torch.tensor(ids[:wanted], dtype=torch.int64).reshape(request.samples, request.length - 1)
    begin: list[int] = tokenizer.encode(BOS, add_special_tokens=False).ids
    rows = torch.cat([torch.tensor([begin] * request.samples, dtype=torch.int64), rows], dim=1)
    if int(rows.max()) >= vocab_size:
        raise DataError(
            "The tokenizer and the model do not fit: a token id is outside the model's vocabulary",
            where=file,
            expected=f"ids below vocab_size = {vocab_size}",
            found=f"token id {int(rows.max())}",
            hint="use the tokenizer of the same release",
        )
    digest = hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationData(torch.split(rows, request.micro_batch), rows.numel(), 1, digest, str(file))


def _first_ids(text: str, wanted: int, tokenizer: Tokenizer) -> list[int]:
    """At least `wanted` ids of the text's beginning, if it has so many; a long text is not tokenized as a whole."""
    characters = wanted * _CHARACTERS_PER_TOKEN
    while True:
        ids: list[int] = tokenizer.encode(text[:characters], add_special_tokens=False).ids
        # The last ids depend on where the text was cut.
        if characters >= len(text) or len(ids) > wanted + _CHARACTERS_PER_TOKEN:
            return ids
        characters *= 2
