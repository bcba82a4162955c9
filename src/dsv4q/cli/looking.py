"""Commands that look at what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4q.checkpoint.pin import pin_of
from dsv4q.checkpoint.source import scan
from dsv4q.cli.options import Json, Quiet
from dsv4q.console import console_of, human_bytes, human_seconds
from dsv4q.errors import command
from dsv4q.evaluation.rounding import Emulation
from dsv4q.evaluation.show import show_evaluation
from dsv4q.host import is_first_rank
from dsv4q.verify.judge import verify as judge


def verify_shards(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of the artifact to judge.")],
    source: Annotated[
        Path | None, typer.Option(help="The checkpoint it was made from: compare and re-encode every tensor.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read the data too: scales, NaN, digests of report.json.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where weights are compared: auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge an artifact or a BF16 checkpoint.

    Names, dtypes, shapes and config by default; the data too with --deep; every byte against the checkpoint it was
    made from with --source. Exit code 3 if anything differs from what config.json and the format demand.
    """
    from dsv4q.report.show import show_verification, verifying

    console = console_of(as_json, quiet, is_first_rank)
    with verifying(console, artifact, reads=bool(deep or source)) as progress:
        result = judge(artifact, source=source, deep=deep, progress=progress, device=device)
    pin = None if source is None else pin_of(scan(source))
    console.data(result.as_dict() | ({} if pin is None else {"source_pin": pin.as_dict()}))
    show_verification(result, console, pin)
    if not result.ok:
        raise typer.Exit(3)
    console.talk(f"verified in {human_seconds(result.seconds)}")


def report(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that quantize made.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the page here instead of ARTIFACT/report.html.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every value too, as verify-shards --deep.")] = False,
    verification: Annotated[
        Path | None, typer.Option(help="File with what verify-shards --json printed, to show it on the page.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the report of a run as one HTML page.

    Sizes, weight errors, experts, input scales, time, memory, shards; verification and evaluation. The page needs no
    network. Headers are verified each time; exit code 3 if something differs from what must be there.
    """
    from dsv4q.report.page.write import PageRequest, write_report
    from dsv4q.report.show import verifying

    console = console_of(as_json, quiet, is_first_rank)
    with verifying(console, artifact, reads=verify) as progress:
        made = write_report(PageRequest(artifact, out, deep=verify, saved=verification), progress)
    console.data(made.as_dict())
    for gap in made.gaps:
        console.warn(f"not on the page: {gap}")
    console.print(f"{made.page}: {human_bytes(made.nbytes)}")
    if made.checked is not None and made.checked.differences:
        found = f"{len(made.checked.differences):,} differences"
        console.print(f"{found}; {command('dsv4q', 'verify-shards', artifact)} lists them all")
        raise typer.Exit(3)


def eval_(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Checkpoint to judge, in any form.")],
    reference: Annotated[Path, typer.Option(help="Checkpoint that it was made from; its tokenizer is used.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Text file, or JSONL with messages or text; else the reference's heldout.jsonl or .txt."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 512,
    micro_batch: Annotated[int, typer.Option(help="Texts computed at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    activations: Annotated[
        Emulation,
        typer.Option(
            help="Inputs that are rounded: as kernels on SM 10.0 and later do; all but those of NVFP4 linears, "
            "as on SM 9.0; none."
        ),
    ] = Emulation.KERNELS,
    answers: Annotated[int, typer.Option(help="Prompts from the text that both models answer greedily.")] = 0,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer, at most.")] = 64,
    answers_from: Annotated[
        Path | None, typer.Option(help='JSON with lists of token ids: "prompts", and "answers" if a server gave them.')
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Write the result to ARTIFACT/eval.json as well.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the artifact with its source over a text.

    Runs both, block by block: perplexity, KL divergence, agreement, error of the residual streams, and how many
    drafts of MTP the main model would accept: on the text, and with --answers on what each model says itself. Inputs
    of quantized linears are rounded as the kernels do, and what their calibrated ranges clip is counted.
    """
    from dsv4q import evaluate as story
    from dsv4q.evaluation.answers import AnswersRequest
    from dsv4q.evaluation.data import DataRequest

    console = console_of(as_json, quiet, is_first_rank)
    request = DataRequest(file=data, samples=samples, length=length, micro_batch=micro_batch)
    job = story.EvaluationRequest(
        artifact=artifact, reference=reference, data=request, device=device, activations=activations,
        answers=AnswersRequest(answers, answer_tokens, answers_from), save=save,
    )  # fmt: skip
    result = story.evaluate(job, console)
    console.data(result)
    show_evaluation(result, console)


def diff_(
    a: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint folder; errors are relative to it.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint folder that is held against it.")],
    device: Annotated[str, typer.Option(help="Where values are decoded: auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two artifacts or checkpoints.

    Tensor by tensor and by class, whatever both are stored as: compressed-tensors, ModelOpt, DeepSeek's own layout
    or BF16. Exit code 0 if both have the same tensors, stored as the same types, byte for byte; 3 if one is missing,
    is stored otherwise (even with equal values) or differs. Other files, config.json too, do not count.
    """
    from dsv4q import diff as story
    from dsv4q.foreign.result import show_diff

    console = console_of(as_json, quiet, is_first_rank)
    result = story.diff(story.DiffRequest(a, b, device), console)
    console.data(result)
    show_diff(result, console)
    if not result["same"]:
        raise typer.Exit(3)
