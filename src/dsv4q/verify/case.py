"""What the value checks of `verify-shards` share: the case they judge, and the shape of one piece of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from dsv4q.checkpoint.source import Checkpoint
from dsv4q.verify.result import Log

if TYPE_CHECKING:
    from dsv4q.verify.judge import Survey

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Case:
    """The artifact, what the header checks learned of it, and what it is held against."""

    survey: Survey
    artifact: Checkpoint
    source: Checkpoint | None
    deep: bool
    device: torch.device
    """Where quantized weights are judged."""
    log: Log

    def differs(self, check: str, name: str, expected: str, found: str) -> None:
        file = self.survey.sound[name].file if name in self.survey.sound else None
        self.log.differs(check, tensor=name, file=file, expected=expected, found=found)


class Job(Protocol):
    """A piece of work: `load` runs on any thread, `judge` afterwards on the main one, job by job in order."""

    label: str
    """What the progress bar says meanwhile."""
    size: int
    """Bytes of the artifact that it deals with."""
    memory: int
    """Bytes that it holds between `load` and the end of `judge`."""

    def load(self) -> None: ...

    def judge(self) -> None: ...


def place(mask: torch.Tensor) -> list[int]:
    """Index of the first true element."""
    first: list[int] = mask.nonzero()[0].tolist()
    return first
