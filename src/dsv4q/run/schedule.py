"""The blocks that a run works on, in their order, and what brings them: both before there is a model.

Importing libraries and building the model take seconds, in which the first blocks come in and kernels are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.pipes import Behind
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.data.tokens import CalibrationData
from dsv4q.formats.kernels import import_for, warm_up
from dsv4q.plan.needs import GpuUse
from dsv4q.plan.plan import Plan
from dsv4q.plan.work import WorkTable
from dsv4q.run.loader import BlockTask, LoadedBlock, Loader, Put
from dsv4q.run.memory import memory_maker
from dsv4q.run.ranks import Ranks
from dsv4q.run.residuals import ResidualStreams


@dataclass
class Schedule:
    """What this process has to do, block by block, and the residual streams between blocks.

    Of several ranks all make one at the same time.

    Args:
        put: takes what is written as it is.
        advance: called with a block's name and the number of its source bytes that are done with.
        check_stop: called where the run may be stopped; raises KeyboardInterrupt if it shall be.
    """

    plan: Plan
    work: WorkTable
    source: Checkpoint
    journal: Journal
    data: CalibrationData | None
    device: torch.device
    gpu: GpuUse | None
    ranks: Ranks
    put: Put
    advance: Callable[[str, int], None]
    check_stop: Callable[[], None]
    copied: list[BlockTask] = field(init=False)
    """Those that nothing computes with, which the artifact lacks."""
    streams: ResidualStreams = field(init=False)
    tasks: list[BlockTask] = field(init=False)
    """All others."""
    loader: Loader = field(init=False)

    def __post_init__(self) -> None:
        share = self.ranks.share
        shapes = [(*ids.shape, self.plan.dims.hc_mult, self.plan.dims.hidden) for ids in self.batches]
        self.streams = ResidualStreams(
            self.journal.folder,
            self.device,
            shapes,
            share.among(len(shapes)),
            on_gpu=self.gpu is not None and self.gpu.keeps_streams,
        )
        missing = [b for b in self.plan.blocks if b not in self.journal.done and self.plan.block_tensors(b)]
        copied = set(self.work.copied)
        self.copied = [self._task(block, encode=True) for block in missing if block in copied]
        self.tasks = [*self._again(), *(self._task(block, encode=True) for block in missing if block not in copied)]
        self.loader = self._loader()

    @property
    def batches(self) -> tuple[torch.Tensor, ...]:
        """Token ids of each micro-batch."""
        return () if self.data is None else self.data.batches

    @contextmanager
    def begun(self) -> Iterator[Iterator[LoadedBlock]]:
        """Context in which the blocks of `tasks` come in, the first ones from now on; see `Loader.blocks`."""
        import_for(self.device)  # before it is imported on two threads at once
        with Behind(1, 1) as beside:
            beside.put(partial(warm_up, self.device))
            with self.loader.blocks(self.tasks, self.check_stop) as blocks:
                yield blocks

    def _again(self) -> list[BlockTask]:
        """Finished blocks that must be computed once more, for the residual streams behind them were not saved."""
        forward = [block for block in self.plan.blocks if self.work.is_forward(block)]
        finished = [block for block in forward if block in self.journal.done]
        if self.ranks.is_leader:
            self.streams.forget_but(finished)
        self.ranks.wait_for_all()
        if len(finished) == len(forward) or not finished:
            return []
        saved = self.streams.restore(finished)
        missing = finished[finished.index(saved) + 1 :] if saved else finished
        return [self._task(block, encode=False) for block in missing]

    def _task(self, block: str, *, encode: bool) -> BlockTask:
        return BlockTask(block, self.work.blocks[block], self.ranks.share.rank, encode)

    def _loader(self) -> Loader:
        use = self.gpu or replace(self.plan.estimate.gpu[0], memories=1)
        experts = [spec.name for spec in self.plan.source_specs if spec.block == "layers.0" and spec.expert is not None]
        packed = self.plan.experts_packed
        return Loader(
            self.source,
            self.device,
            budget=use.read_ahead,
            memory=memory_maker(self.source, self.plan.dims, experts, self.device, packed=packed, step=use.experts),
            memories=use.memories,
            put=self.put,
            advance=self.advance,
        )
