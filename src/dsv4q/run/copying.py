"""Blocks that nothing computes with, head and MTP draft as a rule: from the source to the writer, ahead of the others.

They are 15 GB of Flash: seconds of a disk's work, which it has while libraries are imported and the model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Self

import torch

from dsv4q.checkpoint.pipes import Behind, loaded_ahead
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.formats.dtypes import tensor_bytes
from dsv4q.host import compute_alone, cores
from dsv4q.plan.work import RankWork, TensorWork
from dsv4q.run.loader import BESIDE, BlockTask, Put, read_to_copy


class Copying(Behind):
    """A thread that copies blocks one after another, from the beginning of the context on.

    Args:
        put: takes what is to be written as it is.
        advance: called with a block and its bytes that are done with.
    """

    def __init__(
        self, tasks: Sequence[BlockTask], source: Checkpoint, put: Put, advance: Callable[[str, int], None]
    ) -> None:
        super().__init__(1, len(tasks))
        self.tasks = tasks
        self._source, self._write, self._advance = source, put, advance
        self._copies: dict[str, Future[RankWork]] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        self._copies = {task.name: self.put(partial(self._copy, task)) for task in self.tasks}
        return self

    def done(self, task: BlockTask, check_stop: Callable[[], None]) -> RankWork:
        """What this rank did for a block, once all of it has been handed to the writer.

        Raises:
            WeightError: a tensor that no model has.
            SourceError: the source cannot be read.
        """
        self.drain(check_stop)
        return self._copies[task.name].result()

    def _copy(self, task: BlockTask) -> RankWork:
        done = RankWork(task.rank)
        wanted = [work for work in task.work if task.reads(work)]
        # Imports go on beside it, whose thread many others would keep waiting, and writing.
        few = max(1, min(BESIDE, cores() // 4))
        ahead = loaded_ahead(wanted, self._read, lambda work: work.spec.nbytes, threads=few, begin=compute_alone)
        with ahead as read:
            for work, tensor in read:
                self.check()
                names = task.keeps(work)
                self._write(task.name, [(name, tensor_bytes(tensor)) for name in names])
                done.read_bytes += work.source_bytes
                done.write_bytes += len(names) * work.spec.nbytes
        self._advance(task.name, sum(work.spec.nbytes for work in task.work))
        return done

    def _read(self, work: TensorWork) -> torch.Tensor:
        return read_to_copy(self._source, work.spec)
