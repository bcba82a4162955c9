"""Those about the engines that serve an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4q.cli.options import Json, Quiet, Resume
from dsv4q.console import console_of, human_bytes
from dsv4q.engines.facts import read_facts
from dsv4q.errors import command
from dsv4q.host import is_first_rank


def export(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Finished artifact, in the other layout.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the new one: new, empty or unfinished.")],
    layout: Annotated[str, typer.Option(help="modelopt (SGLang, vLLM) or compressed-tensors (vLLM).")],
    source: Annotated[Path, typer.Option(help="The native release that the artifact was made from.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="What quantize made, where report.json does not say it.")
    ] = None,
    resume: Resume = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an artifact in the layout of another engine.

    Bytes are copied: experts from the artifact, everything else from the native release. It can be stopped at any
    moment: the same command goes on where it was. No GPU is used.
    """
    from dsv4q.config import load_config
    from dsv4q.export import story
    from dsv4q.export.job import Export

    console = console_of(as_json, quiet, is_first_rank)
    parsed = None if config is None else load_config(config)
    report = story.export(Export(artifact, out, source, layout, parsed, resume), console)
    console.data(report)
    made = report["artifact"]
    console.print(
        f"{out}: {made['tensors']:,} tensors, {human_bytes(made['bytes'])}, in {len(made['shards'])} shards. "
        f"Check every byte with: {command('dsv4q', 'verify-shards', out, '--deep', '--source', source)}"
    )


def compat(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact or checkpoint, in any layout.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which engines load an artifact, and why.

    Reads headers only. By engine and version: whether it loads the model and the draft, the reason, and whether that
    was seen in a run or read in the engine's source; what the experts run on; the command lines. Exit code 1 if no
    engine is known to load it.
    """
    from dsv4q.engines.compat import rows_of
    from dsv4q.engines.show import compat_json, is_loaded, show_compat

    console = console_of(as_json, quiet, is_first_rank)
    facts = read_facts(artifact)
    rows = rows_of(facts)
    console.data(compat_json(facts, rows, artifact))
    show_compat(facts, rows, artifact, console)
    if not is_loaded(rows):
        raise typer.Exit(1)
