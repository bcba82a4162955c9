"""Ctrl-C and SIGTERM at places of our choosing.

Python raises KeyboardInterrupt between any two steps of the main thread, also while it holds the lock of a future that
a worker waits for; then the pool never ends and the run hangs instead of stopping. So during a run the signal only sets
a flag, and the run asks for it between tensors and micro-batches. SIGTERM, which torchrun and Slurm send to what they
end, is taken in the same way, so that a rank says why it ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Context in which Ctrl-C and SIGTERM wait for a call of the function that it gives: it raises KeyboardInterrupt.

    A second Ctrl-C ends the process at once; what is finished is on disk at any moment. Off the main thread, where no
    handler can be set, signals are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: set[int] = set()

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            os._exit(1)
        asked.add(number)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    check()
