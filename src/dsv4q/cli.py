"""Commands: parse, call, print, exit code. Nothing heavy is imported before a command needs it.

Exit codes: 0 good, 1 refused or failed for a named reason, 2 usage, 3 verification found differences.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dsv4q import __version__
from dsv4q.checkpoint.native import scan_source
from dsv4q.console import bytes_of, console_of, human_bytes, human_seconds
from dsv4q.errors import Interrupted, UsageError, command
from dsv4q.evaluation.show import show_evaluation
from dsv4q.host import free_bytes, is_first_rank
from dsv4q.verify.judge import verify as judge


class _Commands(TyperGroup):
    """typer turns Ctrl-C into exit code 130 without a word before `main` sees it, so it is caught in here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = "what was finished is kept; the same command goes on from there"
            hint = kept if ctx.invoked_subcommand in ("quantize", "dequantize") else None
            raise Interrupted("Stopped before the end", hint=hint) from None


app = typer.Typer(
    name="dsv4q",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Continue an unfinished run in OUT, or start it over.")
]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="What to make: a YAML file, or a shipped config by its name.")
]
GpuMemory = Annotated[
    int | None,
    typer.Option(parser=bytes_of, metavar="BYTES", help="Of a GPU use no more than this, such as 16GB or 24GiB."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsv4q {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize DeepSeek-V4 checkpoints for vLLM, with the MTP draft intact."""


@app.command()
def toy(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write the checkpoint into.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML with other dimensions.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other weights of the same shapes.")] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="BF16 weights that came from MXFP4 and FP8.")] = False,
    native: Annotated[
        bool, typer.Option("--native", help="The --grid weights as DeepSeek publishes them: FP8 and MXFP4.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a small checkpoint to try things on.

    A complete DeepSeek-V4 in everything but size: every kind of layer, an MTP layer, several shards, a tokenizer
    and chat samples. The weights are random; with --grid or --native the quantized linears hold values that MXFP4
    and FP8 can store, and of one seed each is the other's dequantization.
    """
    from dsv4q.made_up.native import grid_form, native_form
    from dsv4q.made_up.toy import RANDOM, ToyConfig, load_toy_config, write_toy

    console = console_of(as_json, quiet, is_first_rank)
    if grid and native:
        raise UsageError(
            "--grid and --native exclude each other", where="dsv4q toy", hint="run it twice, into two OUTs"
        )
    form = native_form() if native else grid_form() if grid else RANDOM
    summary = write_toy(out, load_toy_config(config) if config else ToyConfig(), seed, form)
    console.data(asdict(summary))
    console.print(
        f"{out}: {summary.tensors} tensors, {summary.mtp_tensors} of them mtp.*, in {len(summary.shards)} shards, "
        f"{human_bytes(summary.nbytes)}; tokenizer and {summary.conversations} chat samples"
    )


@app.command()
def configs(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one, to copy and change.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the shipped configs, or print one."""
    from dsv4q.config import config_file, shipped_configs, summary_of

    console = console_of(as_json, quiet, is_first_rank)
    if name is not None:
        path = config_file(Path(name))
        console.data({"name": path.stem, "path": path, "text": path.read_text(encoding="utf-8")})
        console.print(path.read_text(encoding="utf-8").rstrip("\n"))
        return
    found = {name: summary_of(path) for name, path in shipped_configs().items()}
    console.data({"configs": found})
    console.table("Configs", ["name", "makes"], list(found.items()))


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder, or just a config.json.")],
    config: ConfigFile,
    skeleton: Annotated[
        Path | None, typer.Option(help="Write the planned artifact here as sparse files: true headers, no data.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=4096, help="Say what each of so many ranks would do.")] = 1,
    gpu_memory: GpuMemory = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run would read, write and need.

    Names every problem that can be found without reading a tensor. Exit code 1 if there is one.
    """
    from dsv4q.config import load_config
    from dsv4q.plan.needs import gpu_problem
    from dsv4q.plan.plan import make_plan, with_problem
    from dsv4q.plan.work import WorkTable
    from dsv4q.report.show import show_plan, show_ranks

    console = console_of(as_json, quiet, is_first_rank)
    parsed = load_config(config)
    with scan_source(source) as checkpoint:
        made = make_plan(checkpoint, parsed, free_disk=free_bytes(skeleton or Path.cwd()))
    made = with_problem(made, gpu_problem(made.estimate, gpu_memory))
    shares = WorkTable(made, ranks).by_rank() if ranks > 1 else []
    console.data(made.as_dict() | ({"ranks": shares} if shares else {}))
    show_plan(made, console, gpu_memory)
    if shares:
        show_ranks(shares, console)
    if skeleton is not None and not made.problems:
        from dsv4q.plan.small_files import write_skeleton

        write_skeleton(skeleton, source, made)
        console.talk(f"skeleton of {len(made.shards)} sparse shards written to {skeleton}")
    if made.problems:
        raise typer.Exit(1)


@app.command()
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder: BF16, or DeepSeek's own FP8 and MXFP4.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the artifact: new, empty or unfinished.")],
    config: ConfigFile,
    data: Annotated[
        str | None, typer.Option(help="Calibrate on this dataset instead of the config's: hub id, folder or JSONL.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data; else the config's, where the data has it.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    gpu_memory: GpuMemory = None,
    resume: Resume = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan that the run would execute; stop.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint into an artifact for vLLM.

    Can be stopped at any moment: the same command goes on where it was and gives the same bytes.
    """
    from dsv4q import quantize as story
    from dsv4q.config import load_config
    from dsv4q.report.build import show_report
    from dsv4q.report.page.write import write_missing_page
    from dsv4q.report.show import show_plan
    from dsv4q.run.calibration import with_other_data

    console = console_of(as_json, quiet, is_first_rank)
    parsed = with_other_data(load_config(config), source, data, split)
    job = story.Job(source, out, parsed, device, gpu_memory, resume)
    if dry_run:
        made = story.prepare(job)
        console.data(made.as_dict())
        show_plan(made, console, gpu_memory)
        if made.problems:
            raise typer.Exit(1)
        return
    report = story.quantize(job, console)
    if is_first_rank():
        write_missing_page(out)
    console.data(report)
    show_report(report, console)
    console.print(f"{out} is complete. Check every byte with: {_check(out, source)}")


@app.command()
def rehearse(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder on the disk to rehearse with.")],
    config: ConfigFile,
    source: Annotated[
        Path | None,
        typer.Option(help="A config.json, or a folder with one; DeepSeek-V4-Flash's if left out. No weights are read."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many main layers, of every kind, and proportionally fewer shards."),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Made-up weights as DeepSeek publishes them, FP8 and MXFP4, not BF16.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the shards: OUT becomes a complete artifact.")] = False,
    judged: Annotated[
        bool, typer.Option("--judge/--no-judge", help="Verify each shard; without, the time is that of quantize.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    gpu_memory: GpuMemory = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try a whole run on this machine without the checkpoint.

    Tells time, memory and disk before the download: the same as quantize at the real dimensions, but weights are made
    up as they are read, and each shard is verified and then deleted. Exit code 3 if a shard is not as it must be.
    Several GPUs: start it with torchrun, as quantize.
    """
    from dsv4q import rehearse as story
    from dsv4q.config import load_config
    from dsv4q.report.rehearsal import show_rehearsal

    console = console_of(as_json, quiet, is_first_rank)
    wanted = story.Rehearsal(
        out, load_config(config), source or story.FLASH, layers, keep, device, gpu_memory, native, judged
    )
    result = story.rehearse(wanted, console)
    if result is None:  # another rank than the first
        return
    console.data(result)
    show_rehearsal(result, console)
    if result["differences"]:
        raise typer.Exit(3)


@app.command()
def dequantize(
    native: Annotated[Path, typer.Argument(metavar="NATIVE", help="Checkpoint in DeepSeek's own FP8 and MXFP4.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint: new, empty or unfinished.")],
    shards: Annotated[
        int | None, typer.Option(min=1, max=99_999, help="Balanced shards; the files of NATIVE if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where weights are decoded: auto, cpu, cuda or cuda:N.")] = "auto",
    resume: Resume = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the BF16 checkpoint that a native one stands for.

    Every value is exact, or the run stops. It can be stopped at any moment: the same command goes on where it was.
    Not needed for quantize, which reads a native checkpoint itself.
    """
    from dsv4q import dequantize as story

    console = console_of(as_json, quiet, is_first_rank)
    report = story.dequantize(story.Dequantization(native, out, shards, resume, device), console)
    console.data(report)
    console.print(
        f"{out}: {report['tensors']:,} tensors, {human_bytes(report['bytes'])}, in {len(report['shards'])} shards. "
        f"Check every byte with: {_check(out, native)}"
    )


def _check(artifact: Path, source: Path) -> str:
    return command("dsv4q", "verify-shards", artifact, "--deep", "--source", source)


@app.command("verify-shards")
def verify_shards(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of the artifact to judge.")],
    source: Annotated[
        Path | None, typer.Option(help="The checkpoint it was made from: compare and re-encode every tensor.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read the data too: scales, pairs, ranges, NaN.")] = False,
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
    console.data(result.as_dict())
    show_verification(result, console)
    if not result.ok:
        raise typer.Exit(3)
    console.talk(f"verified in {human_seconds(result.seconds)}")


@app.command()
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


@app.command("eval")
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
    save: Annotated[bool, typer.Option("--save", help="Write the result to ARTIFACT/eval.json as well.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the artifact with its source over a text.

    Runs both, block by block: perplexity, KL divergence, agreement, error of the residual streams, and how many
    drafts of MTP the main model would accept. Inputs of quantized linears are rounded as the kernels do.
    """
    from dsv4q import evaluate as story
    from dsv4q.evaluation.data import DataRequest

    console = console_of(as_json, quiet, is_first_rank)
    request = DataRequest(file=data, samples=samples, length=length, micro_batch=micro_batch)
    job = story.EvaluationRequest(artifact=artifact, reference=reference, data=request, device=device, save=save)
    result = story.evaluate(job, console)
    console.data(result)
    show_evaluation(result, console)


@app.command("diff")
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
