"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4q.console import bytes_of

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
