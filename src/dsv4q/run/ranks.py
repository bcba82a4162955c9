"""Ranks of one job, as torchrun starts them. The only module that imports torch.distributed.

The main thread of every rank makes the same calls in the same order. A second group, for the thread that finishes
blocks, carries Python objects beside it. Without torchrun there is one rank and nothing here talks to anybody.
"""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dsv4q.console import Console
from dsv4q.errors import DeviceError, RankError
from dsv4q.host import RankVariables, leftover_ranks, rank_variables
from dsv4q.plan.work import ALONE, Share

_TIMEOUT = timedelta(hours=2)
"""A rank may wait this long for another that reads from a slow storage or writes to one."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job."""

    share: Share = ALONE
    local_rank: int = 0
    _groups: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Groups in which Python objects are passed: `ahead` by the main threads, `behind` by those that finish blocks."""

    @property
    def is_leader(self) -> bool:
        """Rank 0 keeps the journal, names shards, and speaks."""
        return self.share.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.share.count == 1

    def device_name(self, name: str) -> str:
        """The device of this rank, if the user named a kind of device: GPU n for the n-th rank of a machine."""
        if self.is_alone or name.partition(":")[0] == "cpu" or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def exchange(self, stack: torch.Tensor) -> None:
        """Fill `stack` [E, ...] on every rank: each gives the experts of its share.

        Raises:
            RankError: another rank is gone. So do all calls below.
        """
        if self.is_alone:
            return
        for rank in range(self.share.count):
            part = Share(rank, self.share.count).experts(len(stack))
            if part:
                with _talking("exchanging weights"):
                    dist.broadcast(stack[part.start : part.stop], src=rank)

    def widest(self, ends: torch.Tensor) -> torch.Tensor:
        """Ends [..., 2] (smallest, largest) over all ranks, same dtype; what is NaN anywhere becomes infinite."""
        if self.is_alone:
            return ends
        found = torch.nan_to_num(ends.to(torch.float32), nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        # inf as a smallest value means "nothing seen"; a NaN must not hide behind that.
        found[..., 0] = torch.where(ends[..., 0].isnan(), float("-inf"), found[..., 0])
        sides = torch.stack([-found[..., 0], found[..., 1]], dim=-1)
        with _talking("reducing statistics"):
            dist.all_reduce(sides, op=dist.ReduceOp.MAX)
        return torch.stack([-sides[..., 0], sides[..., 1]], dim=-1).to(ends.dtype)

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if not self.is_alone:
            with _talking("reducing statistics"):
                dist.all_reduce(counts, op=dist.ReduceOp.SUM)
        return counts

    def from_leader(self, value: Any) -> Any:
        """What rank 0 gives, on every rank."""
        if self.is_alone:
            return value
        box = [value]
        with _talking("asking rank 0"):
            dist.broadcast_object_list(box, src=0, group=self._groups["ahead"])
        return box[0]

    def wait_for_all(self) -> None:
        """Go on when every rank has come here."""
        self.gathered(None)
        self.from_leader(None)

    def gathered(self, value: Any, *, behind: bool = False) -> list[Any]:
        """What every rank gives, by rank, on rank 0; an empty list elsewhere.

        Args:
            behind: called by the thread that finishes blocks.
        """
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.share.count
        with _talking("telling rank 0"):
            group = self._groups["behind" if behind else "ahead"]
            dist.gather_object(value, found if self.is_leader else None, dst=0, group=group)
        return found if self.is_leader else []

    def files_to_sync(self, files: Collection[str]) -> list[str]:
        """Of the files that the ranks of this machine wrote for a block, those that this one is to make durable.

        fsync brings to the disk what all processes of a machine wrote into a file. N calls for the same file wait for
        the same pages N times, and make N commits of the file system. What another machine wrote is not in its reach.

        Args:
            files: that this rank wrote. It has written all, and goes on when all ranks have. Called by the thread that
                finishes blocks.
        """
        if self.is_alone:
            return sorted(files)
        # torchrun's number of this machine; without it every rank is taken to be on a machine of its own
        machine = os.environ.get("GROUP_RANK", f"rank {self.share.rank}")
        found: list[Any] = [None] * self.share.count
        with _talking("waiting for all to have written"):
            dist.all_gather_object(found, (machine, sorted(files)), group=self._groups["behind"])
        writers: dict[str, list[int]] = defaultdict(list)
        for rank, (where, names) in enumerate(found):
            for name in names if where == machine else ():
                writers[name].append(rank)
        turns = enumerate(sorted(writers))
        return [name for n, name in turns if writers[name][n % len(writers[name])] == self.share.rank]


@contextmanager
def _talking(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what every backend raises when a peer is gone
        raise RankError(
            "Another rank of this job is gone or does not answer",
            where=f"rank {os.environ.get('RANK', '0')}, while {what}",
            found=str(error).splitlines()[0][:200],
            hint="its own message says why; finished blocks are kept, and the same command goes on from there, with "
            "any number of ranks",
        ) from error


@contextmanager
def ranks(device: str, console: Console) -> Iterator[Ranks]:
    """The ranks that torchrun started, or one alone. Ends the groups on exit.

    Args:
        device: as the user named it: auto, cpu, cuda or cuda:N.

    Raises:
        DeviceError: torch was built without torch.distributed.
        RankError: the ranks do not find each other; a variable of theirs is missing or impossible.
    """
    here = rank_variables()
    if here.count == 1:
        leftover = leftover_ranks()
        if leftover is not None:
            console.warn(leftover)
        yield Ranks()
        return
    if not dist.is_available():
        raise DeviceError("This torch has no torch.distributed", where="torchrun", found=torch.__version__)
    waits = f"Rank {here.rank} of {here.count} waits at {here.meet} for the others"
    if here.by_torchrun:
        console.talk(waits)
    else:  # whoever set these variables may not know that there are no others
        Console().talk(f"{waits}: RANK, WORLD_SIZE and MASTER_ADDR are set; unset them to run one process")
    # Its functions take the default group of the moment of their import as a default argument, and would hold it.
    importlib.import_module("torch.distributed.nn")
    with _talking("finding the others"):
        dist.init_process_group(backend=_backend(device, here), timeout=_TIMEOUT)
        groups = {name: dist.new_group(backend="gloo", timeout=_TIMEOUT) for name in ("ahead", "behind")}
    try:
        yield Ranks(Share(dist.get_rank(), here.count), here.local_rank, groups)
    finally:
        # A group that somebody refers to lives until the interpreter ends, where its threads may abort the process.
        groups.clear()
        dist.destroy_process_group()


def _backend(device: str, here: RankVariables) -> str:
    """NCCL where every rank of this machine has a GPU of its own; it refuses to share one, gloo does not."""
    own = here.local_count <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if device != "cpu" and own else "gloo"
