"""The process around the command line: standard streams, and what goes wrong as text and an exit code."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

from dsv4q.cli.app import app
from dsv4q.console import Console, Mode, Running, open_standard_streams
from dsv4q.errors import DiskError, Dsv4qError, Interrupted
from dsv4q.host import quick_beginning


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command, turn what goes wrong into text and an exit code."""
    if not os.environ.get("DSV4Q_DEBUG"):
        # llmcompressor logs from its import on, before anybody can ask it not to
        os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
    open_standard_streams()
    atexit.register(gc.freeze)  # or Python, before it ends, looks for cycles in all that a run has made: seconds
    try:
        with quick_beginning():
            app(args=arguments)
    except Dsv4qError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(Interrupted("Stopped before the end"))
    except OSError as error:
        _fail(
            DiskError(
                "The system refused a file operation",
                where=error.filename,
                found=error.strerror or error,
                hint="DSV4Q_DEBUG=1 shows where",
            )
        )


def _fail(error: Dsv4qError) -> NoReturn:
    if os.environ.get("DSV4Q_DEBUG"):
        raise error
    try:
        Running.console.error(error)
    except OSError:
        # stdout itself is what failed; in quiet mode errors go to stderr, which a closed terminal takes along
        with suppress(OSError):
            Console(Mode.QUIET).error(error)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or Python flushes the old one again at its exit
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
