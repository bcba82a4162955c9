"""Loading ahead: in order, within the budget, and over when the caller is done."""

from __future__ import annotations

import threading
import time

import pytest

from dsv4q.checkpoint.pipes import loaded_ahead


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
