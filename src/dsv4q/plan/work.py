"""Who does what when several ranks work on one artifact. Pure: plan, run and report ask the same functions.

A rank reads a run of each block's routed experts and sends them to the others, so that the source is read once; every
other tensor of a block is small and read by all. It computes whole micro-batches, encodes the experts it has read,
and writes what it encoded. Tensors that are copied as they are go round in turn. None of it changes a byte.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The part of rank `rank` among `count`."""

    rank: int = 0
    count: int = 1

    def experts(self, experts: int) -> range:
        """Routed experts that it reads and encodes."""
        return range(experts * self.rank // self.count, experts * (self.rank + 1) // self.count)

    def has(self, number: int) -> bool:
        """Whether it has this micro-batch, copied tensor or linear outside the experts, counted within its kind."""
        return number % self.count == self.rank

    def among(self, count: int) -> list[int]:
        """Those of `count` things that it has."""
        return [number for number in range(count) if self.has(number)]


ALONE = Share()
