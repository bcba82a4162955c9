"""The device that a user names with `--device`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dsv4q.errors import DeviceError

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda or cuda:N; tried out.

    Raises:
        DeviceError: another name; no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    expected = "auto, cpu, cuda or cuda:N"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise DeviceError("There is no such device", where="--device", expected=expected, found=repr(name))
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            "There is no such device", where=f"--device {name}", expected=expected, found=str(error).splitlines()[0]
        ) from error
    return device
