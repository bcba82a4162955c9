"""Who does what with each tensor: the one table that the run executes, the plan shows and the report is held against.

A rank reads a run of each block's routed experts and sends them to the others, so that the source is read once; every
other tensor that is computed with is small and read by all. A rank computes whole micro-batches, encodes the experts
it has read, and writes what it encoded. Everything else goes round in turn. None of it changes a byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsv4q.checkpoint.shards import PlannedTensor
from dsv4q.layout import TensorSpec
from dsv4q.plan.plan import Plan


@dataclass(frozen=True)
class Share:
    """The part of rank `rank` among `count`."""

    rank: int = 0
    count: int = 1

    def experts(self, experts: int) -> range:
        """Routed experts that it reads and encodes."""
        return range(experts * self.rank // self.count, experts * (self.rank + 1) // self.count)

    def among(self, count: int) -> list[int]:
        """Those of `count` things that go round in turn which it has."""
        return list(range(self.rank, count, self.count))


ALONE = Share()


@dataclass(frozen=True)
class TensorWork:
    """What a run does with one tensor of the source for one block, and which rank does it."""

    spec: TensorSpec
    source_bytes: int
    """Bytes of the source's files that hold it."""
    kept: tuple[PlannedTensor, ...]
    """Tensors of the artifact that are its very bytes."""
    encoded: tuple[PlannedTensor, ...]
    """Tensors of the artifact that it is encoded into."""
    computed: bool
    """Whether the forward or the encoder wants it on the device."""
    rank: int
    """The rank that writes what comes of it; of a routed expert, and of what is not computed with, the only reader."""

    def is_read_by(self, rank: int) -> bool:
        """Whether this rank reads it from the source's files."""
        if self.computed and self.spec.expert is None:
            return True
        return rank == self.rank and (self.computed or bool(self.kept))


@dataclass(frozen=True)
class WorkTable:
    """All the work of a plan, divided among `count` ranks."""

    plan: Plan
    count: int = 1

    @cached_property
    def blocks(self) -> dict[str, tuple[TensorWork, ...]]:
        """Block -> what is done for it, in the order in which the source is read."""
        specs: dict[str, list[TensorSpec]] = defaultdict(list)
        for spec in self.plan.source_specs:
            specs[spec.block].append(spec)
        return {block: (*self._own(block, specs[block]), *self._copies(block)) for block in self.plan.blocks}

    def is_forward(self, block: str) -> bool:
        """Whether the calibration tokens go through this block."""
        return self.plan.estimate.calibration_tokens > 0 and (block == "embed" or block.startswith("layers."))

    @cached_property
    def copied(self) -> tuple[str, ...]:
        """Blocks that the artifact has and with none of whose tensors anything is computed; they are copied first."""
        tensors = {block: self.plan.block_tensors(block) for block in self.plan.blocks if not self.is_forward(block)}
        return tuple(block for block, some in tensors.items() if some and not any(t.encoded for t in some))

    def _own(self, block: str, specs: Sequence[TensorSpec]) -> Iterator[TensorWork]:
        """The block's own tensors."""
        made: dict[str, list[PlannedTensor]] = defaultdict(list)
        for tensor in self.plan.block_tensors(block):
            if tensor.encoded or tensor.spec.block == block:
                made[tensor.spec.name].append(tensor)
        linears = 0
        for number, spec in enumerate(specs):
            outputs = made[spec.name]
            encoded = tuple(t for t in outputs if t.encoded)
            computed = self.is_forward(block) or bool(encoded)
            turn = number
            if encoded and spec.expert is None:
                turn, linears = linears, linears + 1
            rank = self._rank_of(spec.expert) if spec.expert is not None and computed else turn % self.count
            kept = tuple(t for t in outputs if not t.encoded)
            yield TensorWork(spec, self._source_bytes(spec), kept, encoded, computed, rank)

    def _copies(self, block: str) -> Iterator[TensorWork]:
        """Copies of another block's tensors that this block writes."""
        copies = [t for t in self.plan.block_tensors(block) if not t.encoded and t.spec.block != block]
        for number, copy in enumerate(copies):
            spec = copy.spec
            yield TensorWork(spec, self._source_bytes(spec), (copy,), (), False, number % self.count)

    def _rank_of(self, expert: int) -> int:
        shares = (Share(rank, self.count) for rank in range(self.count))
        return next(s.rank for s in shares if expert in s.experts(self.plan.dims.experts))

    def _source_bytes(self, spec: TensorSpec) -> int:
        return self.plan.source_files.entries[spec.name][1]

    def by_rank(self) -> list[dict[str, Any]]:
        """What each rank reads, computes and writes in all, by rank; report.json has the same of what was done."""
        batches = self.plan.estimate.micro_batches
        found = [RankWork(rank, micro_batches=len(Share(rank, self.count).among(batches))) for rank in self._all]
        for work in (work for part in self.blocks.values() for work in part):
            for rank in self._all:
                found[rank].read_bytes += work.source_bytes * work.is_read_by(rank)
            found[work.rank].encoded_linears += bool(work.encoded)
            found[work.rank].write_bytes += sum(t.nbytes for t in (*work.kept, *work.encoded))
        return [one.as_dict() for one in found]

    @property
    def _all(self) -> range:
        return range(self.count)


@dataclass
class RankWork:
    """What one rank read, computed and wrote."""

    rank: int
    read_bytes: int = 0
    micro_batches: int = 0
    encoded_linears: int = 0
    write_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))
