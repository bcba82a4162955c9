"""Commands that make something, or say what making it would take."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsv4q.checkpoint.native import scan_source
from dsv4q.cli.options import ConfigFile, GpuMemory, Json, Quiet, Resume
from dsv4q.console import console_of, human_bytes
from dsv4q.errors import Dsv4qError, UsageError, command
from dsv4q.host import free_bytes, is_first_rank

if TYPE_CHECKING:
    from dsv4q.engines.compat import Row
    from dsv4q.export.plan import ExportPlan
    from dsv4q.plan.plan import Plan


def toy(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write the checkpoint into.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML with other dimensions.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other weights of the same shapes.")] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="BF16 weights that came from MXFP4 and FP8.")] = False,
    native: Annotated[
        bool, typer.Option("--native", help="The --grid weights as DeepSeek publishes them: FP8 and MXFP4.")
    ] = False,
    draft: Annotated[Literal["mtp", "dspark", "none"] | None, typer.Option(help="Its draft; MTP as usual.")] = None,
    for_vllm: Annotated[
        bool, typer.Option("--for-vllm", help="Dimensions for which vLLM has kernels, so that it can be served.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a small checkpoint to try things on.

    A complete DeepSeek-V4 in everything but size: every kind of layer, a draft, several shards, a tokenizer
    and chat samples. The weights are random; with --grid or --native the quantized linears hold values that MXFP4
    and FP8 can store, and of one seed each is the other's dequantization.
    """
    from dsv4q.made_up.native import grid_form, native_form
    from dsv4q.made_up.toy import RANDOM, load_toy_config, write_toy

    console = console_of(as_json, quiet, is_first_rank)
    if grid and native:
        raise UsageError("--grid and --native exclude each other", where="dsv4q toy", hint="two OUTs take two runs")
    form = native_form() if native else grid_form() if grid else RANDOM
    summary = write_toy(out, load_toy_config(config, draft, for_vllm=for_vllm), seed, form)
    console.data(asdict(summary))
    console.print(
        f"{out}: {summary.tensors} tensors, {summary.mtp_tensors} of them mtp.*, in {len(summary.shards)} shards, "
        f"{human_bytes(summary.nbytes)}; tokenizer and {summary.conversations} chat samples"
    )


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


def plan(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder, or just a config.json.")],
    config: ConfigFile = Path("nvfp4-fp8-mtp"),
    skeleton: Annotated[
        Path | None, typer.Option(help="Write the planned artifact here as sparse files: true headers, no data.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=4096, help="Say what each of so many ranks would do.")] = 1,
    gpu_memory: GpuMemory = None,
    layout: Annotated[
        str, typer.Option(help="compressed-tensors, or modelopt: also what `export` would make of it.")
    ] = "compressed-tensors",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run would read, write and need.

    Names every problem that can be found without reading a tensor. Exit code 1 if there is one.
    """
    from dsv4q.config import load_config
    from dsv4q.engines.show import engines_line
    from dsv4q.export.plan import check_layout, plan_export
    from dsv4q.plan.needs import gpu_problem
    from dsv4q.plan.plan import make_plan, with_problem
    from dsv4q.plan.work import WorkTable
    from dsv4q.report.show import show_plan, show_ranks
    from dsv4q.run.calibration import tokenizer_finding

    console = console_of(as_json, quiet, is_first_rank)
    parsed = load_config(config)
    exported: ExportPlan | None = None
    with scan_source(source) as checkpoint:
        made = make_plan(checkpoint, parsed, free_disk=free_bytes(skeleton or Path.cwd()))
        if checkpoint.has_weights:
            made = with_problem(made, tokenizer_finding(parsed, source), stops=parsed.needs_data)
        if check_layout(layout):
            try:
                exported = plan_export(checkpoint, made)
            except Dsv4qError as error:
                made = with_problem(made, error)
    made = with_problem(made, gpu_problem(made.estimate, gpu_memory))
    shares = WorkTable(made, ranks).by_rank() if ranks > 1 else []
    rows = _engines(made, exported)
    others = {
        "ranks": shares,
        "exported": None if exported is None else exported.as_dict(),
        "engines": [row.as_dict() for row in rows],
    }
    console.data(made.as_dict() | {name: value for name, value in others.items() if value})
    show_plan(made, console, gpu_memory, ranks)
    if exported is not None:
        exported.show(console)
    if rows:
        console.print(f"engines    {engines_line(rows)}")
    if shares:
        show_ranks(shares, console)
    if skeleton is not None and not made.problems:
        from dsv4q.plan.small_files import write_exported_skeleton, write_skeleton

        if exported is None:
            write_skeleton(skeleton, source, made)
        else:
            write_exported_skeleton(skeleton, source, exported.shards, exported.texts)
        written = made if exported is None else exported.shards
        console.talk(f"skeleton of {len(written.shards)} sparse shards written to {skeleton}")
    if made.problems:
        raise typer.Exit(1)


def _engines(made: Plan, exported: ExportPlan | None = None) -> list[Row]:
    """What each engine makes of what a plan writes; nothing if the plan has problems."""
    from dsv4q.engines.compat import rows_of
    from dsv4q.plan.modelcard import plan_facts

    return [] if made.problems else rows_of(plan_facts(made) if exported is None else exported.facts)


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
    from dsv4q.engines.show import engines_line
    from dsv4q.report.build import show_report
    from dsv4q.report.page.write import write_missing_page
    from dsv4q.report.show import show_plan
    from dsv4q.run.calibration import with_other_data

    console = console_of(as_json, quiet, is_first_rank)
    parsed = with_other_data(load_config(config), source, data, split)
    job = story.Job(source, out, parsed, device, gpu_memory, resume)
    if dry_run:
        made = story.prepare(job)
        rows = _engines(made)
        console.data(made.as_dict() | ({"engines": [row.as_dict() for row in rows]} if rows else {}))
        show_plan(made, console, gpu_memory)
        if rows:
            console.print(f"engines    {engines_line(rows)}")
        if made.problems:
            raise typer.Exit(1)
        return
    report = story.quantize(job, console)
    if is_first_rank():
        write_missing_page(out)
    console.data(report)
    show_report(report, console)
    console.print(f"{out} is complete. Check every byte with: {_check(out, source)}")


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
