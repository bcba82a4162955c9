"""Ctrl-C at places of our choosing.

Python raises KeyboardInterrupt between any two steps of the main thread, also while it holds the lock of a future that
a worker waits for; then the pool never ends and the run hangs instead of stopping. So during a run the signal only sets
a flag, and the run asks for it between tensors and micro-batches.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Context in which Ctrl-C waits for a call of the function that it gives, which then raises KeyboardInterrupt.

    A second Ctrl-C ends the process at once; what is finished is on disk at any moment. Off the main thread, where no
    handler can be set, signals are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = False

    def note(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            os._exit(1)
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()
