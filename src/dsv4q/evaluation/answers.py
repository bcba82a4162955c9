"""Greedy answers of a model to a few prompts, and how many drafts a server would accept while it writes them.

A server's text is the main model's own: it verifies every draft, so each token is the most likely one after those
before it, whatever the draft said. So the text can be found first, by the main model alone, and then one forward of
main model and draft over it tells of every place what the draft would have proposed there. `count_drafts` walks along
these proposals as the engine does.

Finding the text: without a cache each token would cost a forward. Instead all tokens of an answer are guessed, one
forward gives the model's choice at each place, and these are the next guess. Choices behind right tokens are right, so
each forward settles one token more at least, and all of them at once if the guess was right. This is Jacobi decoding
(Santilli et al., Accelerating Transformer Inference for Translation via Parallel Decoding, 2023); what comes out is
what one token after the other gives. The first guess is the text's own answer, of the second model the first one's.

Shape letters: B batch, S sequence, P tokens of a prompt, N of an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsv4q.errors import DataError, UsageError
from dsv4q.evaluation.metrics import BootstrapEstimate, estimate

COLUMNS = ("drafts_1", "accepted_1", "drafts_2", "accepted_2_position_1", "accepted_2_position_2", "tokens")
"""Per prompt, with one draft token at a time and with two: drafts, accepted tokens; and the tokens of the answer."""


@dataclass(frozen=True)
class AnswersRequest:
    """What the user asked for.

    Raises:
        UsageError: a number that is too small, or two sources of prompts.
    """

    count: int = 0
    """Prompts from the text; 0: none."""
    tokens: int = 64
    """Of an answer, at most."""
    file: Path | None = None
    """Prompts, and answers if it has them; see `read_answers`."""

    def __post_init__(self) -> None:
        for option, value, least in (("--answers", self.count, 0), ("--answer-tokens", self.tokens, 2)):
            if value < least:
                raise UsageError(
                    "The evaluation cannot have this value", where=option, expected=f"at least {least}", found=value
                )
        if self.count and self.file is not None:
            raise UsageError("Both options give prompts", where="--answers, --answers-from", expected="one of them")

    @property
    def wanted(self) -> bool:
        return self.count > 0 or self.file is not None


@dataclass
class Answer:
    """One prompt, and what follows it."""

    prompt: Tensor
    """I64 [P], on the host."""
    tokens: Tensor
    """I64 [N]: a guess behind the first `settled` ones."""
    settled: int = 0

    @property
    def is_done(self) -> bool:
        return self.settled == len(self.tokens)

    @property
    def ids(self) -> Tensor:
        """I64 [P + N]."""
        return torch.cat([self.prompt, self.tokens])

    def settle(self, choices: Tensor, end: int) -> None:
        """Take over the main model's choices I64 [N], each made behind the prompt and the guess before it.

        Args:
            end: id that ends an answer; it is the answer's last token.
        """
        choices = torch.cat([self.tokens[: self.settled], choices[self.settled :]])
        wrong = (choices != self.tokens).nonzero()
        settled = int(wrong[0]) + 1 if len(wrong) else len(choices)
        # Of an end among what is still a guess nothing is known.
        ended = (choices[:settled] == end).nonzero()
        if len(ended):
            settled = int(ended[0]) + 1
            choices = choices[:settled]
        self.tokens, self.settled = choices, settled


@dataclass
class Answers:
    """The answers of one model, and what became of its drafts."""

    name: str
    """`reference` or `artifact`."""
    answers: list[Answer]
    passes: int = 0
    """Forwards that it took to find them."""
    own: int = 0
    """Tokens of the answers that are the main model's choice when the whole text is read at once."""
    counts: list[list[int]] = field(default_factory=list)
    """Per prompt, in the order of `COLUMNS`; empty if there is no draft."""

    @property
    def columns(self) -> Tensor:
        """F64 [prompts, 6]."""
        return torch.tensor(self.counts or [[0] * len(COLUMNS)], dtype=torch.float64)

    def as_dict(self) -> dict[str, Any]:
        """`k_1`, `k_2`: with so many draft tokens at a time (vLLM's `num_speculative_tokens`).

        `acceptance`: accepted / drafted tokens. `position_1`, `position_2`: accepted at that place / drafts.
        `mean_accepted_length`: tokens that one run of the main model yields, 1 + accepted / drafts.
        """
        columns, tokens = self.columns, sum(len(answer.tokens) for answer in self.answers)
        rates = {name: estimate(columns, function).as_dict() for name, function in RATES.items()}
        return {
            "answers": [answer.tokens.tolist() for answer in self.answers],
            "passes": self.passes,
            "own_choice": self.own / tokens,
            "k_1": {name.removeprefix("k_1 "): rate for name, rate in rates.items() if name.startswith("k_1 ")},
            "k_2": {name.removeprefix("k_2 "): rate for name, rate in rates.items() if name.startswith("k_2 ")},
            "counts": dict(zip(COLUMNS, (int(n) for n in columns.sum(dim=0)), strict=True)),
        }


RATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k_1 acceptance": lambda s: s[..., 1] / s[..., 0],
    "k_1 mean_accepted_length": lambda s: 1 + s[..., 1] / s[..., 0],
    "k_2 acceptance": lambda s: (s[..., 3] + s[..., 4]) / (2 * s[..., 2]),
    "k_2 position_1": lambda s: s[..., 3] / s[..., 2],
    "k_2 position_2": lambda s: s[..., 4] / s[..., 2],
    "k_2 mean_accepted_length": lambda s: 1 + (s[..., 3] + s[..., 4]) / s[..., 2],
}
"""Functions of sums F64 [..., 6]; NaN where nothing was drafted."""


def change(one: Answers, other: Answers, rate: str) -> BootstrapEstimate:
    """`one` minus `other` of one of `RATES`, paired by prompt."""
    width, function = len(COLUMNS), RATES[rate]
    columns = torch.cat([one.columns, other.columns], dim=1)
    return estimate(columns, lambda s: function(s[..., :width]) - function(s[..., width:]))


# ------------------------------------------------------------------------------------------------ prompts


def prompts_of(batches: Iterable[Tensor], request: AnswersRequest, turn: Sequence[int]) -> list[Answer]:
    """Prompts from the samples I64 [B, S] of a text, with what the text says next as the first guess.

    A prompt is the beginning of a sample up to the assistant's first turn, `turn` included; of a sample without one,
    its first half.

    Raises:
        UsageError: fewer samples than prompts.
    """
    rows = [row for batch in batches for row in batch]
    if len(rows) < request.count:
        raise UsageError(
            "There are not so many samples",
            where="--answers",
            expected=f"at most {len(rows):,}, the number of --samples",
            found=request.count,
        )
    return [guessed(*_cut(row, turn), request.tokens) for row in rows[: request.count]]


def _cut(row: Tensor, turn: Sequence[int]) -> tuple[Tensor, Tensor]:
    places = (row.unfold(0, len(turn), 1) == torch.tensor(turn)).all(dim=1).nonzero()
    at = int(places[0]) + len(turn) if len(places) else len(row) // 2
    return row[:at], row[at:]


def guessed(prompt: Tensor, guess: Tensor, tokens: int) -> Answer:
    """An unfinished answer of exactly so many tokens; a guess that is too short is filled up with id 0."""
    guess = guess[:tokens]
    return Answer(prompt, torch.cat([guess, guess.new_zeros(tokens - len(guess))]))


def read_answers(file: Path, tokens: int, vocab: int) -> list[Answer]:
    """Prompts of a JSON file, `{"prompts": [[id, ...], ...], "answers": [[id, ...], ...]}`.

    Answers that the file has are settled, of any length; without `answers` they are still to be found.

    Raises:
        DataError: it cannot be read or has another form, or an id is outside the vocabulary.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("The prompts cannot be read", where=file, found=error) from error
    prompts = found.get("prompts") if isinstance(found, dict) else None
    answers = found.get("answers", prompts) if isinstance(found, dict) else None
    if prompts is None or answers is None or not _are_ids(prompts, answers, vocab):
        raise DataError(
            "The prompts have another form",
            where=file,
            expected='{"prompts": [[id, ...], ...], "answers": [[id, ...], ...]}, as many answers as prompts or none, '
            f"no empty list, ids from 0 to {vocab - 1}",
        )
    pairs = [(torch.tensor(one), torch.tensor(other)) for one, other in zip(prompts, answers, strict=True)]
    if "answers" in found:
        return [Answer(prompt, answer, len(answer)) for prompt, answer in pairs]
    return [guessed(prompt, prompt[:0], tokens) for prompt, _ in pairs]


def _are_ids(prompts: Any, answers: Any, vocab: int) -> bool:
    both = (prompts, answers)
    if not all(isinstance(one, list) and one for one in both) or len(prompts) != len(answers):
        return False
    lists = [*prompts, *answers]
    return all(isinstance(ids, list) and ids for ids in lists) and all(
        type(token) is int and 0 <= token < vocab for ids in lists for token in ids
    )


def batched(answers: Sequence[Answer], size: int) -> list[Tensor]:
    """Prompts with their answers as micro-batches I64 [B, S], filled up on the right: nothing looks ahead."""
    return [
        pad_sequence([answer.ids for answer in answers[at : at + size]], batch_first=True)
        for at in range(0, len(answers), size)
    ]


# ------------------------------------------------------------------------------------------------ drafts


def count_drafts(answer: Answer, first: Tensor, second: Tensor, after: int) -> list[int]:
    """What an engine would count of one answer, in the order of `COLUMNS`.

    The first token comes with the prompt. Then each step drafts behind the last token that is known, keeps proposals up
    to the first wrong one, and adds the main model's own token. It ends when the answer's last token is known; what was
    drafted beyond it is counted as well, for engines verify first and look for the end afterwards (vLLM 0.33.0,
    `v1/core/sched/scheduler.py`, `update_from_output`).

    Args:
        first, second: I64 [P + N - 1]: proposals with the token at place t + 1 as the last one known, for t + 2, t + 3.
        after: the main model's choice behind the last token.
    """
    ids = [*answer.ids.tolist(), after]
    begin, last = len(answer.prompt), len(answer.ids) - 1
    counts = dict.fromkeys(COLUMNS, 0) | {"tokens": len(answer.tokens)}
    at = begin
    while at < last:
        accepted = int(first[at - 1]) == ids[at + 1]
        counts["drafts_1"] += 1
        counts["accepted_1"] += accepted
        at += 1 + accepted
    at = begin
    while at < last:
        accepted = int(first[at - 1]) == ids[at + 1]
        again = accepted and int(second[at - 1]) == ids[at + 2]
        counts["drafts_2"] += 1
        counts["accepted_2_position_1"] += accepted
        counts["accepted_2_position_2"] += again
        at += 1 + accepted + again
    return list(counts.values())
