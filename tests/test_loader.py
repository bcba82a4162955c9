"""How many threads read: few beside a GPU's work, more from when it waits for them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dsv4q.run import loader
from dsv4q.run.loader import BESIDE, READ_THREADS, BlockTask, LoadedBlock, Loader, Pace


class Readers:
    """Threads that come to a pace and stay until they are let go."""

    def __init__(self, pace: Pace, count: int) -> None:
        self.inside, self.most = 0, 0
        self._pace, self._lock, self._go = pace, threading.Lock(), threading.Event()
        self.pool = ThreadPoolExecutor(count)
        for _ in range(count):
            self.pool.submit(self._read)

    def _read(self) -> None:
        with self._pace:
            with self._lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            self._go.wait(10)
            with self._lock:
                self.inside -= 1

    def come_to(self, count: int) -> bool:
        """Whether so many are inside soon, and no more after that."""
        until = time.monotonic() + 5
        while self.inside < count and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.05)
        return self.inside == count

    def end(self) -> None:
        self._go.set()
        self.pool.shutdown()


def test_no_more_threads_read_than_are_allowed_and_all_get_their_turn() -> None:
    pace = Pace(4, 2)
    readers = Readers(pace, 8)
    assert readers.come_to(2)
    pace.allow(3)
    assert readers.come_to(3)
    pace.allow(100)
    assert readers.come_to(4)
    readers.end()
    assert readers.inside == 0 and readers.most == 4


def loader_of(device: str) -> Loader:
    nothing: Any = None
    return Loader(nothing, torch.device(device), 1, nothing, 1, nothing, nothing)


def block(*, experts: bool) -> LoadedBlock:
    memory: Any = object() if experts else None
    return LoadedBlock(BlockTask("", (), 0, encode=True), memory, memory=memory)


def test_a_gpu_reads_with_all_threads_from_when_it_waits_until_its_first_experts_are_there() -> None:
    paced = loader_of("cuda")
    blocks = paced._paced(iter([block(experts=False), *[block(experts=True)] * 3]))
    paced._wait(lambda: None)
    assert paced._pace.allowed == BESIDE, "nobody has asked for a block yet"
    seen = [paced._pace.allowed for _ in blocks]
    assert seen == [READ_THREADS, BESIDE, BESIDE, BESIDE]


def test_each_tenth_of_a_second_that_a_block_is_waited_for_doubles_the_threads_for_good() -> None:
    paced = loader_of("cuda")
    blocks = paced._paced(iter([block(experts=True)] * 3))
    next(blocks)
    asked = []
    for _ in range(3):
        paced._wait(lambda: asked.append(paced._pace.allowed))
    assert asked == [2 * BESIDE, 4 * BESIDE, READ_THREADS]
    next(blocks)
    assert paced._pace.allowed == READ_THREADS


def test_without_a_gpu_all_threads_read_and_no_more_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "cores", lambda: 3)
    paced = loader_of("cpu")
    assert [paced._pace.allowed for _ in paced._paced(iter([block(experts=True)] * 2))] == [3, 3]
