"""`dsv4q` with the moments of its beginning on stderr: imports done, blocks begun, first layer's forward.

    python scripts/bench_start.py [--stop] rehearse OUT --config CONFIG --native --no-judge --json

Seconds since the interpreter came to this file. With `--stop` the process ends once the first layer's forward begins,
and leaves OUT as it is then.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import time

BEGIN = time.time()


def say(moment: str) -> None:
    print(f"{time.time() - BEGIN:.2f} s: {moment}", file=sys.stderr, flush=True)


def watch(*, stop: bool) -> None:
    """Have the first forward of transformers' decoder layer tell its moment."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer

    real = DeepseekV4DecoderLayer.forward

    def first(self: object, *arguments: object, **keywords: object) -> object:
        say("first layer's forward")
        DeepseekV4DecoderLayer.forward = real
        if stop:
            os._exit(0)
        return real(self, *arguments, **keywords)

    DeepseekV4DecoderLayer.forward = first


def main() -> None:
    stop = sys.argv[1:2] == ["--stop"]
    sys.argv = ["dsv4q", *sys.argv[1 + stop :]]
    import dsv4q.host

    if hasattr(dsv4q.host, "quick_beginning"):
        gc.disable()  # as the command does before it imports anything large
    import dsv4q.rehearse

    watch(stop=stop)
    say("imports")
    module = dsv4q.rehearse
    real = module.run_blocks

    def loop(*arguments: object, **keywords: object) -> object:
        say("plan, data and made-up source")
        return real(*arguments, **keywords)

    module.run_blocks = loop
    runpy.run_module("dsv4q", run_name="__main__")


if __name__ == "__main__":
    main()
