"""slow.py: which tests are kept out of the fast set."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import runs
from slow import WHOLE_RUNS, starts_much


def process() -> None:
    subprocess.run(["true"])


def inner_process() -> None:
    import subprocess as local

    local.run(["true"])


def fork() -> None:
    os.fork()


def through_a_helper() -> list[None]:
    return [process() for _ in range(1)]


def whole_run() -> None:
    runs.run(runs.toy_job(runs.CONFIGS))


@contextmanager
def held() -> Iterator[None]:
    process()
    yield


def through_a_context() -> None:
    with held():
        pass


class Starter:
    def start(self) -> None:
        process()


def through_a_class() -> None:
    Starter().start()


STARTERS = [process, inner_process, fork, through_a_helper, whole_run, through_a_context, through_a_class]


def plain() -> int:
    return len(os.environ) + len(runs.CONFIGS.parts)


@pytest.mark.parametrize("function", STARTERS)
def test_what_starts_a_process_or_a_whole_run_is_slow(function: Callable[[], object]) -> None:
    assert starts_much(function)


def test_what_starts_neither_is_fast() -> None:
    assert not starts_much(plain)


@pytest.mark.parametrize("name", sorted(WHOLE_RUNS))
def test_the_names_of_whole_runs_are_those_of_functions(name: str) -> None:
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))
