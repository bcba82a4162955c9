"""How a command begins: without searches for reference cycles, until its long work."""

from __future__ import annotations

import gc

import pytest

from dsv4q.host import quick_beginning, stoppable


def test_a_beginning_is_not_held_up_by_searches_for_cycles() -> None:
    with quick_beginning():
        assert not gc.isenabled()


def test_long_work_is_searched_for_cycles_but_not_what_was_there_before() -> None:
    with quick_beginning():
        kept = [[] for _ in range(1000)]
        with stoppable():
            assert gc.isenabled() and gc.get_freeze_count() > len(kept)


def test_after_a_command_everything_is_searched_again() -> None:
    with quick_beginning(), stoppable():
        pass
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_failed_beginning_leaves_the_search_as_it_was() -> None:
    with pytest.raises(KeyError), quick_beginning():
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_who_searches_at_times_of_their_own_is_left_alone() -> None:
    gc.disable()
    try:
        with quick_beginning(), stoppable():
            assert not gc.isenabled()
        assert not gc.isenabled()
        with stoppable():
            assert not gc.isenabled()
    finally:
        gc.enable()
