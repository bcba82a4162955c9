"""`dsv4q` with the moments of its beginning on stderr: what is over and done with, and after how many seconds.

    python scripts/bench_start.py [--stop] rehearse OUT --config CONFIG --native --no-judge --json

Seconds since the interpreter came to this file, and how many of them the main thread was at work. With `--stop` the
process ends once the first layer's forward begins, and leaves OUT as it is then. The command itself is as ever: nothing
is imported before it wants it.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from typing import Any

BEGIN = time.time()

OVER = {
    "torch": "the plan",
    "dsv4q.run.schedule": "torch and data",
    "dsv4q.run.pipeline": "the first block is on its way",
    "llmcompressor": "transformers",
    "dsv4q.run.block": "llmcompressor",
}
"""Module -> what is over when it is about to be imported."""


def say(moment: str) -> None:
    busy = time.thread_time()
    print(f"{time.time() - BEGIN:.2f} s, {busy:.2f} s of work: {moment}", file=sys.stderr, flush=True)


class Watching:
    """A finder of modules that finds none, but sees which are looked for."""

    def __init__(self, *, stop: bool) -> None:
        self.stop, self.left = stop, dict(OVER)

    def find_spec(self, name: str, *_: object) -> None:
        moment = self.left.pop(name, None)
        if moment is None:
            return
        say(moment)
        if name == "dsv4q.run.pipeline":
            self.watch_modules()

    def watch_modules(self) -> None:
        """Have the first forward of transformers' decoder layer tell its moment."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        def first(module: Any, _: object) -> None:
            if type(module).__name__ == "DeepseekV4DecoderLayer":
                hook.remove()
                say("model, embedding: the first layer's forward begins")
                if self.stop:
                    os._exit(0)

        hook = register_module_forward_pre_hook(first)


def main() -> None:
    stop = sys.argv[1:2] == ["--stop"]
    sys.argv = ["dsv4q", *sys.argv[1 + stop :]]
    sys.meta_path.insert(0, Watching(stop=stop))  # type: ignore[arg-type]
    runpy.run_module("dsv4q", run_name="__main__")


if __name__ == "__main__":
    main()
