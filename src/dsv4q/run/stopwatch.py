"""How long the stages of a block take, on the host or on a GPU's own timeline."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Stopwatch:
    """Seconds by stage of one block: on a GPU of its own timeline, for the host runs ahead of it."""

    device: torch.device
    _spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = self._now()
        try:
            yield
        finally:
            self._spans.append((name, begin, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds by stage; waits until the device has got there."""
        found: dict[str, float] = defaultdict(float)
        for name, begin, end in self._spans:
            if self.device.type == "cuda":
                end.synchronize()
            found[name] += begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
        return dict(found)
