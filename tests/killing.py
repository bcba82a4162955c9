"""SIGKILL at any change of the disk, for tests of runs that die."""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from collections.abc import Callable

import pytest

SYSCALLS = ("pwritev", "fsync", "replace", "write", "truncate", "unlink", "rmdir", "mkdir", "link")
"""Every way in which a run changes the disk, syncs included."""


def _counting(after: float) -> tuple[dict[str, Callable[..., object]], Callable[[], int]]:
    """The system calls, each of which kills the process when `after` calls were made, and how many there were.

    Threads make them: `next` of a counter is one step for Python, unlike `+= 1`.
    """
    numbers = itertools.count(1)

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if next(numbers) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    return {name: counting(getattr(os, name)) for name in SYSCALLS}, lambda: next(numbers) - 1


def changes_of(run: Callable[[], object]) -> int:
    """How often `run` changes the disk."""
    calls, count = _counting(float("inf"))
    with pytest.MonkeyPatch.context() as patch:
        for name, call in calls.items():
            patch.setattr(os, name, call)
        run()
    return count()


def killed(run: Callable[[], object], after: int) -> bool:
    """Run in a forked child that SIGKILLs itself at its next change of the disk after `after`. True if it did."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for name, call in _counting(after)[0].items():
                setattr(os, name, call)
            run()
            status = 0
        except BaseException:
            traceback.print_exc()  # nobody else would tell why the child ended
        finally:
            os._exit(status)
    _, result = os.waitpid(child, 0)
    assert os.WIFSIGNALED(result) or os.WEXITSTATUS(result) == 0
    return os.WIFSIGNALED(result)
