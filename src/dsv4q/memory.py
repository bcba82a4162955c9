"""Memory that this process has in use now."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes: `host`, resident; on a GPU also `gpu`, what torch has allocated on `device`."""
    found = {"host": _resident()}
    if device.type == "cuda":
        import torch

        found["gpu"] = int(torch.cuda.memory_allocated(device))
    return found


def _resident() -> int:
    """From Linux' own count of pages; elsewhere only the peak is known."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
