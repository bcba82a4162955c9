"""The story of an evaluation: open both -> tokenize -> both models in step by block -> heads -> drafts -> answers ->
result.

For each block: the reference's block is read, all micro-batches go through it, it is let go; then the artifact's; then
the two residual streams are compared. Memory: one block in use and at most one coming, as it lies on disk, or two
heads, or an embedding, a head and an MTP block; and the residual streams of both, tokens * hc_mult * hidden_size * 4
bytes, on a GPU if it has room for them, else on the host. Answers, if any are asked for, take many passes through one
model after the other (`evaluation/greedy.py`); a small model stays in memory for them.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsv4q import __version__
from dsv4q.checkpoint.files import write_atomic
from dsv4q.console import Console
from dsv4q.data.tokens import CalibrationData
from dsv4q.evaluation import metrics
from dsv4q.evaluation.answers import RATES, Answer, Answers, AnswersRequest, change, prompts_of, read_answers
from dsv4q.evaluation.data import DataRequest, load_data, turn_ids
from dsv4q.evaluation.drafts import COLUMNS, Acceptance, difference, judge_draft, step_1, step_2
from dsv4q.evaluation.filling import Fill, filling, main_blocks
from dsv4q.evaluation.greedy import answer_all
from dsv4q.evaluation.rounding import Emulation
from dsv4q.evaluation.scores import ResidualError, Scores, residual_error, score
from dsv4q.evaluation.side import DRAFT, Side, form_of, open_side, require_alike
from dsv4q.host import gpu_memory_errors, peak_memory, stoppable, usable_device
from dsv4q.model.upstream import quiet_libraries

FORMAT = 1
"""Version of the result's structure."""
SAVED = "eval.json"
_GPU_WORK = 8 << 30
"""What else a block needs beside its weights: a micro-batch in between, weights that are being decoded."""


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation as the user asked for it."""

    artifact: Path
    reference: Path
    data: DataRequest
    device: str = "auto"
    activations: Emulation = Emulation.KERNELS
    answers: AnswersRequest = field(default_factory=AnswersRequest)
    save: bool = False
    """Write the result to ARTIFACT/eval.json as well."""


@dataclass
class Measurements:
    """What was measured."""

    residual: list[ResidualError]
    scores: Scores
    acceptance: list[Acceptance]
    answers: list[Answers]


@torch.no_grad()
def evaluate(request: EvaluationRequest, console: Console) -> dict[str, Any]:
    """Evaluate; returns the result as plain JSON values.

    Raises:
        SourceError: a checkpoint that is damaged or incomplete, or two that are not of one model.
        DataError: no tokenizer, no data or too little, a tokenizer of another vocabulary, unusable prompts.
        UsageError: more answers than samples.
        CalibrationError: non-finite values.
        DeviceError: no such device, or it has too little memory.
    """
    begin = time.time()
    device = usable_device(request.device)
    with quiet_libraries():
        reference = open_side("reference", request.reference, device, request.activations)
        artifact = open_side("artifact", request.artifact, device, request.activations)
        require_alike(reference, artifact)
        data = load_data(request.data, request.reference, request.artifact, reference.dims.vocab)
        asked, end = _asked(request, data, reference.dims.vocab)
        less = "lower --micro-batch or --length, or free the GPU of other work"
        try:
            with gpu_memory_errors(f"--device {device}", hint=less):
                measured = _measure((reference, artifact), data, asked, end, console)
        finally:
            reference.checkpoint.close()
            artifact.checkpoint.close()
    result = _result(request, (reference, artifact), data, measured, time.time() - begin)
    if request.save:
        write_atomic(request.artifact / SAVED, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


# ------------------------------------------------------------------------------------------------ measuring


def schedule(sides: tuple[Side, Side]) -> list[tuple[Side, str]]:
    """Which block of which checkpoint is read when."""
    order = [(side, block) for block in (*main_blocks(sides[0]), "head") for side in sides]
    return order + [(side, block) for side in sides if side.no_draft is None for block in ("embed", "head", DRAFT)]


def _asked(request: EvaluationRequest, data: CalibrationData, vocab: int) -> tuple[list[Answer], int]:
    """Prompts that are to be answered, and the id that ends an answer."""
    answers = request.answers
    if not answers.wanted:
        return [], 0
    turn, end = turn_ids(request.reference)
    if answers.file is not None:
        return read_answers(answers.file, answers.tokens, vocab), end
    return prompts_of(data.batches, answers, turn), end


def _measure(
    sides: tuple[Side, Side], data: CalibrationData, asked: list[Answer], end: int, console: Console
) -> Measurements:
    order = schedule(sides)
    for side in sides:
        side.keeps_streams = side.device.type == "cuda" and _have_room(sides, data)
    nbytes = sum(piece.nbytes for side, block in order for piece in side.pieces(block))
    with stoppable() as check_stop:
        with console.progress("evaluating", nbytes) as progress:

            def note(what: str, nbytes: int) -> None:
                check_stop()
                progress.describe(what)
                progress.advance(nbytes)

            with filling(order, note) as fill:
                residual = _main_blocks(sides, data, fill, check_stop)
                scores = _heads(sides, data, fill, check_stop)
                acceptance = _drafts(sides, data, fill, check_stop)
        answers = answer_all(sides, asked, len(data.batches[0]), end, console, check_stop) if asked else []
        return Measurements(residual, scores, acceptance, answers)


def _have_room(sides: tuple[Side, Side], data: CalibrationData) -> bool:
    """Whether the GPU holds the residual streams of both models beside what a block needs."""
    dims = sides[0].dims
    streams = 2 * data.tokens * dims.hc_mult * dims.hidden * 2
    block = max(sum(t.spec.nbytes for t in side.tensors(block)) for side, block in schedule(sides))
    free, _ = torch.cuda.mem_get_info(sides[0].device)
    return streams + block + _GPU_WORK <= free


def _main_blocks(
    sides: tuple[Side, Side], data: CalibrationData, fill: Fill, check_stop: Callable[[], None]
) -> list[ResidualError]:
    errors = []
    for block in main_blocks(sides[0]):
        for side in sides:
            fill(side, block)
            side.run(block, data.batches, check_stop)
            side.release(block)
        errors.append(residual_error(block, *sides))
    return errors


def _heads(sides: tuple[Side, Side], data: CalibrationData, fill: Fill, check_stop: Callable[[], None]) -> Scores:
    for side in sides:
        fill(side, "head")
    scores = score(*sides, data.batches, check_stop)
    for side in sides:
        side.release("head")
    return scores


def _drafts(
    sides: tuple[Side, Side], data: CalibrationData, fill: Fill, check_stop: Callable[[], None]
) -> list[Acceptance]:
    found: list[Acceptance] = []
    for side in sides:
        if side.no_draft is not None:
            found += [Acceptance(main.name, side.name) for main in sides]
            continue
        for block in ("embed", "head", DRAFT):
            fill(side, block)
        found += judge_draft(side, sides, data.batches, check_stop)
        side.release("embed", "head", DRAFT)
    return found


# ------------------------------------------------------------------------------------------------ the result


def _result(
    request: EvaluationRequest, sides: tuple[Side, Side], data: CalibrationData, measured: Measurements, seconds: float
) -> dict[str, Any]:
    reference, artifact = sides
    return {
        "format": FORMAT,
        **{
            side.name: {"path": str(path), "form": form_of(side)}
            for side, path in ((reference, request.reference), (artifact, request.artifact))
        },
        "data": {
            "source": data.source,
            "samples": request.data.samples,
            "length": request.data.length,
            "micro_batch": request.data.micro_batch,
            "tokens": data.tokens,
            "digest": data.digest,
        },
        "intervals": metrics.METHOD,
        **_quality(measured.scores),
        "residual": [error.as_dict() for error in measured.residual],
        "acceptance": _acceptance(sides, measured.acceptance),
        "answers": _answers(request.answers, measured.answers),
        "activations": request.activations.value,
        "emulated": _by_format(artifact, artifact.runs),
        "rounded_inputs": _by_format(artifact, artifact.rounds),
        "clipping": artifact.clipping.as_dict(),
        "per_sample": _per_sample(measured),
        "device": str(reference.device),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(),
        "versions": {"dsv4q": __version__, "torch": torch.__version__},
    }


def _by_format(side: Side, counts: Callable[[str], bool]) -> dict[str, int]:
    return dict(Counter(scheme.format for module, scheme in side.schemes.items() if counts(module)))


def _per_sample(measured: Measurements) -> dict[str, Any]:
    """Sums of each sample, so that two results on the same text can be compared in pairs."""
    scores = measured.scores
    return {
        "tokens": torch.cat(scores.positions).tolist(),
        "nll": {name: torch.cat(parts).tolist() for name, parts in scores.nll.items()},
        "kl_divergence": torch.cat(scores.divergence).tolist(),
        "top1_agreement": torch.cat(scores.agreed).tolist(),
        "drafts": {
            "columns": COLUMNS,
            **{one.main: one.columns.tolist() for one in measured.acceptance if one.main == one.draft and one.counts},
        },
    }


def _answers(request: AnswersRequest, found: list[Answers]) -> dict[str, Any] | None:
    """Both models' greedy answers, and the change of each rate; None if there are none."""
    if not found:
        return None
    reference, artifact = found
    equal = sum(
        torch.equal(one.tokens, other.tokens) for one, other in zip(reference.answers, artifact.answers, strict=True)
    )
    return {
        "source": "the text" if request.file is None else str(request.file),
        "prompts": [one.prompt.tolist() for one in reference.answers],
        "tokens": request.tokens,
        **{one.name: one.as_dict() for one in found},
        "equal": equal,
        "differences": {
            rate: change(artifact, reference, rate).as_dict() for rate in RATES if artifact.counts and reference.counts
        },
    }


def _quality(scores: Scores) -> dict[str, Any]:
    predicted, positions = torch.cat(scores.predicted), torch.cat(scores.positions)
    nll = {name: torch.cat(parts) for name, parts in scores.nll.items()}
    return {
        "perplexity": {
            **{name: metrics.exp_mean(total, predicted).as_dict() for name, total in nll.items()},
            "ratio": metrics.exp_mean(nll["artifact"] - nll["reference"], predicted).as_dict(),
        },
        "kl_divergence": metrics.mean(torch.cat(scores.divergence), positions).as_dict(),
        "top1_agreement": metrics.mean(torch.cat(scores.agreed), positions).as_dict(),
    }


def _acceptance(sides: tuple[Side, Side], found: list[Acceptance]) -> dict[str, Any]:
    """All pairs, and what changes when the main model, the draft or both are the artifact's."""
    by_pair = {(one.main, one.draft): one for one in found}
    base = by_pair["reference", "reference"]
    changes = {
        "artifact as a whole": ("artifact", "artifact"),
        "artifact's draft alone": ("reference", "artifact"),
        "artifact's main model alone": ("artifact", "reference"),
    }
    return {
        "pairs": [one.as_dict() for one in found],
        "differences": {
            what: {"step_1": difference(by_pair[pair], base, step_1), "step_2": difference(by_pair[pair], base, step_2)}
            for what, pair in changes.items()
            if base.counts and by_pair[pair].counts
        },
        "without_draft": {side.name: side.no_draft for side in sides if side.no_draft is not None},
    }
