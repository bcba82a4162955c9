"""Ahead and behind: in order, within the limit, errors told, and over when the caller is done."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from dsv4q.checkpoint.pipes import Behind, Stopped, loaded_ahead


class Loads:
    """Loads numbers, and remembers how many bytes were ever held at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.started: list[int] = []
        self.held = self.most = 0

    def load(self, item: int) -> str:
        with self.lock:
            self.started.append(item)
            self.held += item
            self.most = max(self.most, self.held)
        time.sleep(0.001 * (item % 3))
        return f"{item}!"

    def drop(self, item: int) -> None:
        with self.lock:
            self.held -= item


def run(items: list[int], budget: int, threads: int = 4) -> tuple[list[tuple[int, str]], Loads]:
    loads, found = Loads(), []
    with loaded_ahead(items, loads.load, lambda item: item, budget=budget, threads=threads) as ready:
        for item, value in ready:
            found.append((item, value))
            loads.drop(item)
    return found, loads


@pytest.mark.parametrize("budget", [1, 7, 20, 10**6])
def test_items_come_in_order_with_what_was_loaded(budget: int) -> None:
    items = [5, 1, 9, 2, 2, 7, 3, 8, 6, 4]
    assert run(items, budget)[0] == [(item, f"{item}!") for item in items]


@pytest.mark.parametrize("budget", [9, 12, 30])
def test_no_more_than_the_budget_is_ever_loaded(budget: int) -> None:
    assert run([5, 1, 9, 2, 2, 7, 3, 8, 6, 4] * 5, budget)[1].most <= budget


def test_an_item_larger_than_the_budget_is_loaded_alone() -> None:
    found, loads = run([3, 100, 3], budget=10)
    assert [item for item, _ in found] == [3, 100, 3]
    assert loads.most == 100


def test_several_items_are_loaded_at_once() -> None:
    both = threading.Barrier(2, timeout=30)  # breaks, and fails the test, unless two loads meet in it
    with loaded_ahead([1, 2], lambda item: both.wait(), lambda item: item) as ready:
        assert len(list(ready)) == 2


def test_an_error_is_raised_where_the_item_would_come() -> None:
    def load(item: int) -> float:
        return 1 / item

    found = []
    with pytest.raises(ZeroDivisionError), loaded_ahead([2, 1, 0, 4], load, lambda item: 1) as ready:
        for item, _ in ready:
            found.append(item)
    assert found == [2, 1]


def test_nothing_is_loaded_any_more_when_the_caller_has_left() -> None:
    loads = Loads()
    with loaded_ahead(range(1, 1000), loads.load, lambda item: item, budget=20, threads=2) as ready:
        next(ready)
    started = len(loads.started)
    assert started < 20
    time.sleep(0.02)
    assert len(loads.started) == started


def test_the_caller_may_stop_while_an_item_is_waited_for() -> None:
    gate = threading.Event()

    def stop() -> None:
        gate.set()  # so that the load can end
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        loaded_ahead([1], lambda item: gate.wait(30), lambda item: 1, check_stop=stop) as ready,
    ):
        next(ready)


# ------------------------------------------------------------------------------------------------ behind


def test_one_thread_works_in_the_order_of_the_calls() -> None:
    done: list[int] = []
    with Behind(1, 100) as behind:
        for number in range(50):
            behind.put(partial(done.append, number))
    assert done == list(range(50))


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_no_more_than_the_limit_is_ever_under_way(limit: int) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def work() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001)
        with lock:
            now -= 1

    with Behind(8, limit) as behind:
        for _ in range(40):
            behind.put(work)
    assert 0 < most <= limit


def test_work_dearer_than_the_limit_is_done_alone() -> None:
    with Behind(2, 10) as behind:
        assert behind.put(lambda: "done", cost=100).result() == "done"


def test_without_threads_work_is_done_in_the_call() -> None:
    with Behind(0, 1) as behind:
        assert behind.put(threading.get_ident).result() == threading.get_ident()


def failing(behind: Behind) -> None:
    """Put work that fails, and wait until it has."""
    with pytest.raises(ZeroDivisionError):
        behind.put(lambda: 1 / 0).result()


@pytest.mark.parametrize("way", ["put", "drain", "leave"])
def test_an_error_behind_is_raised_by_the_next_call_or_at_the_end(way: str) -> None:
    with pytest.raises(ZeroDivisionError), Behind(1, 10) as behind:
        failing(behind)
        if way == "put":
            behind.put(lambda: None)
        elif way == "drain":
            behind.drain()


def test_nothing_is_begun_after_an_error() -> None:
    gate, done = threading.Event(), []

    def fail() -> None:
        gate.wait(30)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Behind(1, 10) as behind:
        behind.put(fail)
        behind.put(lambda: done.append(1))
        gate.set()
    assert done == []


@pytest.mark.parametrize("completes", [False, True])
def test_what_waits_is_done_after_an_error_of_the_caller_only_if_that_was_asked_for(completes: bool) -> None:
    gate, begun, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        gate.wait(30)

    with pytest.raises(KeyError), Behind(1, 10, completes=completes) as behind:
        behind.put(first)
        behind.put(lambda: done.append(1))
        begun.wait(30)
        threading.Timer(0.05, gate.set).start()
        raise KeyError
    assert done == [1] * completes


def test_long_work_is_told_when_nobody_wants_it_any_more() -> None:
    begun, told = threading.Event(), []

    def work(behind: Behind) -> None:
        begun.set()
        try:
            while True:
                behind.check()
                time.sleep(0.001)
        except Stopped:
            told.append(True)
            raise

    with pytest.raises(KeyError), Behind(1, 10) as behind:
        behind.put(partial(work, behind))
        begun.wait(30)
        raise KeyError
    assert told == [True]


def test_draining_asks_whether_to_stop() -> None:
    gate = threading.Event()

    def stop() -> None:
        gate.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Behind(1, 10) as behind:
        behind.put(partial(gate.wait, 30))
        behind.drain(stop)


def test_draining_waits_for_all_that_was_put() -> None:
    done: list[int] = []
    with Behind(2, 10) as behind:
        for number in range(5):
            behind.put(lambda number=number: (time.sleep(0.01), done.append(number)))
        behind.drain()
        assert sorted(done) == list(range(5))
