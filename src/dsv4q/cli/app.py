"""Commands: parse, call, print, exit code. Nothing heavy is imported before a command needs it.

Exit codes: 0 good, 1 refused or failed for a named reason, 2 usage, 3 verification found differences.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dsv4q import __version__
from dsv4q.cli import engines, looking, making
from dsv4q.errors import Interrupted


class _Commands(TyperGroup):
    """typer turns Ctrl-C into exit code 130 without a word before `main` sees it, so it is caught in here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = "what was finished is kept; the same command goes on from there"
            hint = kept if ctx.invoked_subcommand in ("quantize", "dequantize", "export") else None
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


for make in (making.toy, making.configs, making.plan, making.quantize, making.rehearse, making.dequantize):
    app.command()(make)
app.command()(engines.export)
app.command()(engines.compat)
app.command("verify-shards")(looking.verify_shards)
app.command()(looking.report)
app.command("eval")(looking.eval_)
app.command("diff")(looking.diff_)
