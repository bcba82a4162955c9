"""`dsv4q` with a rank that is killed when it begins a block: KILL=RANK:BLOCK, for tests of several ranks."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from dsv4q.__main__ import main
from dsv4q.run.pipeline import BlockLoop

real = BlockLoop._next


def killed(self: BlockLoop, blocks: Any, task: Any, watch: Any) -> Any:
    if f"{self.ranks.share.rank}:{task.name}" == os.environ["KILL"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, blocks, task, watch)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockLoop, "_next", killed)
        main()
