"""Which tests are slow, read from their code: those that start a process or a whole run, by themselves, through a
fixture or through a helper.
"""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

WHOLE_RUNS = {
    "dsv4q.quantize.quantize", "dsv4q.run.run.run_blocks", "dsv4q.rehearse.rehearse", "dsv4q.evaluate.evaluate",
}  # fmt: skip
"""Functions that go through all blocks of a model."""

FIXTURES = {"unfinished", "kept"}
"""Fixtures that come to a whole run through the command line, where the code does not show it."""

SECOND_HALF = {
    "test_resume.py", "test_rehearse.py", "test_bad_input.py", "test_stacks.py", "test_cli.py", "test_calibration.py",
    "test_environment.py", "test_filesystems.py", "test_model_config.py", "test_paths.py", "test_sources.py",
    "test_weights.py", "test_export.py", "test_copying.py", "test_compat.py", "test_verify_digests.py",
    "test_same_bytes.py", "test_eval_modelopt.py", "test_quality.py",
}  # fmt: skip
"""Files whose slow tests `make test` runs with the fast set; the other slow ones take about as long by CPU time."""

HERE = Path(__file__).parent


def is_slow(item: pytest.Item) -> bool:
    """Whether the test or one of its fixtures can come to a process or a whole run."""
    if not isinstance(item, pytest.Function):
        return False
    fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
    return bool(FIXTURES & set(item.fixturenames)) or any(
        starts_much(function) for function in (item.function, *fixtures)
    )


@cache
def starts_much(function: object) -> bool:
    """The same of one function; what it calls is followed through the modules of the tests."""
    waiting, seen = [function], {id(function)}
    while waiting:
        for used in _used(waiting.pop()):
            if used is subprocess or _name(used) in {*WHOLE_RUNS, "posix.fork"}:
                return True
            if id(used) not in seen and _is_of_the_tests(used):
                seen.add(id(used))
                waiting.append(used)
    return False


def _used(thing: object) -> Iterator[object]:
    """What the names in the code of a function, or of a class's methods, stand for."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if isinstance(thing, type):
        yield from (value for value in vars(thing).values() if isinstance(value, FunctionType))
    if not isinstance(thing, FunctionType):
        return
    for code in _codes(thing.__code__):
        found = [thing.__globals__[name] for name in code.co_names if name in thing.__globals__]
        yield from found
        if "subprocess" in code.co_names:
            yield subprocess
        for module in found:
            if isinstance(module, ModuleType):
                yield from (getattr(module, name) for name in code.co_names if hasattr(module, name))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _name(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _is_of_the_tests(thing: object) -> bool:
    if not isinstance(thing, (FunctionType, type)):
        return False
    code = getattr(inspect.unwrap(thing), "__code__", None)
    return (
        Path(code.co_filename).parent == HERE
        if code
        else "." not in thing.__module__ and thing.__module__ != "builtins"
    )
