"""`dsv4q` with a rank that is killed, or one that hangs, when it begins a block: KILL and HANG=RANK:BLOCK.

A rank that hangs is in a call that no signal interrupts, as one that waits in NCCL for a peer is.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

import pytest

from dsv4q import host
from dsv4q.__main__ import main
from dsv4q.run.pipeline import BlockLoop

real = BlockLoop._next


def killed(self: BlockLoop, blocks: Any, task: Any, watch: Any) -> Any:
    here = f"{self.schedule.ranks.share.rank}:{task.name}"
    if here == os.environ["KILL"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if here == os.environ["HANG"]:
        mutex = ctypes.create_string_buffer(64)  # of zeros: PTHREAD_MUTEX_INITIALIZER
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    return real(self, blocks, task, watch)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockLoop, "_next", killed)
        patch.setattr(host, "PATIENCE", 1.0)
        main()
