"""The greedy answers of two models, found by whole passes through one after the other; see `answers.py`.

A model whose weights are at most `RESIDENT` bytes stays in memory for all of its passes; a larger one is read again for
each of them, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from dsv4q.console import Console, human_bytes
from dsv4q.evaluation.answers import Answer, Answers, batched, count_drafts, guessed
from dsv4q.evaluation.drafts import propose
from dsv4q.evaluation.filling import Fill, filling, main_blocks
from dsv4q.evaluation.scores import greedy_ids
from dsv4q.evaluation.side import DRAFT, Side

RESIDENT = 2 << 30
"""Weights of a main model, decoded to BF16."""

Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""Micro-batches I64 [B, S] through a main model -> its choice I64 [S] after each token, of each row, on the host."""


def answer_all(
    sides: Sequence[Side],
    asked: Sequence[Answer],
    size: int,
    end: int,
    console: Console,
    check_stop: Callable[[], None],
) -> list[Answers]:
    """What each model answers, and how its own draft does on that; streams of the sides are lost.

    Args:
        asked: prompts, with guesses, or with answers that are settled already.
        size: prompts that are computed at once.
        end: id that ends an answer.

    Raises:
        CalibrationError: non-finite values.
    """
    found: list[Answers] = []
    for side in sides:
        side.streams = []
    for side in sides:
        side.clipping.counting = False
        answers = Answers(side.name, [replace(one) for one in asked])
        with _passes(side, console, check_stop) as run:
            _find(answers, run, size, end, console)
            batches = batched(answers.answers, size)
            choices = run(batches)
        pairs = list(zip(answers.answers, choices, strict=True))
        answers.own = sum(int((_behind(one, choice) == one.tokens).sum()) for one, choice in pairs)
        if side.no_draft is None:
            drafted = _drafted(side, batches, check_stop)
            answers.counts = [
                count_drafts(one, first, second, int(choice[len(one.ids) - 1]))
                for (one, choice), (first, second) in zip(pairs, drafted, strict=True)
            ]
        # The other model says nearly the same.
        asked = [
            was if was.is_done else guessed(one.prompt, one.tokens, len(was.tokens))
            for one, was in zip(answers.answers, asked, strict=True)
        ]
        found.append(answers)
    return found


def _find(answers: Answers, run: Run, size: int, end: int, console: Console) -> None:
    longest = max(len(one.tokens) for one in answers.answers)
    with console.progress(f"answers of the {answers.name}", len(answers.answers), "answers") as progress:
        while waiting := [one for one in answers.answers if not one.is_done]:
            assert answers.passes < longest, "each pass settles a token of each answer"
            for one, choice in zip(waiting, run(batched(waiting, size)), strict=True):
                one.settle(_behind(one, choice), end)
                progress.advance(one.is_done)
            answers.passes += 1


def _behind(answer: Answer, choice: Tensor) -> Tensor:
    """The choices [N] where the answer's tokens stand, of those after each token of a row."""
    begin = len(answer.prompt) - 1
    return choice[begin : begin + len(answer.tokens)]


@contextmanager
def _passes(side: Side, console: Console, check_stop: Callable[[], None]) -> Iterator[Run]:
    """Passes of any number through one main model; the streams of the last one stay."""
    blocks = [*main_blocks(side), "head"]
    order = [(side, block) for block in blocks]

    def run(batches: Sequence[Tensor], fill: Fill, release: Callable[[str], None]) -> list[Tensor]:
        side.streams = []
        for block in blocks[:-1]:
            fill(side, block)
            side.run(block, batches, check_stop)
            release(block)
        fill(side, "head")
        hidden = (side.hidden(number) for number in range(len(batches)))
        found = [row for one in hidden for row in greedy_ids(side.model.lm_head, one, side.dims.vocab).cpu()]
        release("head")
        return found

    def run_streaming(batches: Sequence[Tensor]) -> list[Tensor]:
        with filling(order, lambda _what, _nbytes: check_stop()) as fill:
            return run(batches, fill, side.release)

    if sum(tensor.spec.nbytes for block in blocks for tensor in side.tensors(block)) > RESIDENT:
        nbytes = sum(piece.nbytes for block in blocks for piece in side.pieces(block))
        console.talk(f"answers of the {side.name}: each pass reads {human_bytes(nbytes)}")
        yield run_streaming
        return
    with filling(order, lambda _what, _nbytes: check_stop()) as fill:
        for block in blocks:
            fill(side, block)
    yield lambda batches: run(batches, lambda _side, _block: None, lambda _block: None)
    side.release(*blocks)


def _drafted(side: Side, batches: Sequence[Tensor], check_stop: Callable[[], None]) -> list[tuple[Tensor, Tensor]]:
    """Proposals of both steps, each I64 [S - 1], of each row, with the streams of the last pass."""
    blocks = ("embed", "head", DRAFT)
    with filling([(side, block) for block in blocks], lambda _what, _nbytes: check_stop()) as fill:
        for block in blocks:
            fill(side, block)
    found: list[tuple[Tensor, Tensor]] = []
    for number, ids in enumerate(batches):
        check_stop()
        first, second = propose(side, number, side.streams[number].to(side.device), ids.to(side.device))
        found += zip(first.cpu(), second.cpu(), strict=True)
    side.release(*blocks)
    return found
