"""Load ahead: the next items are loaded on threads while the caller is busy with one; order kept, memory bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

BUDGET = 512 << 20
"""Bytes that are loaded or being loaded at once."""
THREADS = 4


@contextmanager
def loaded_ahead(
    items: Iterable[K],
    load: Callable[[K], V],
    nbytes: Callable[[K], int],
    *,
    budget: int = BUDGET,
    threads: int = THREADS,
) -> Iterator[Iterator[tuple[K, V]]]:
    """Each item with what `load` made of it, in order.

    Args:
        items: drawn from on the caller's thread, as far ahead as the budget allows.
        load: called on several threads at once; its error is raised where the item would come.
        nbytes: memory that a loaded item takes.
        budget: of bytes loaded and not yet done with; one item is always allowed, however large.

    On leaving, no further load starts and those under way are waited for, so that files may be closed then.
    """
    waiting: deque[tuple[K, Future[V]]] = deque()

    def results(pool: ThreadPoolExecutor) -> Iterator[tuple[K, V]]:
        used = 0
        for item in items:
            size = nbytes(item)
            while waiting and used + size > budget:
                first, future = waiting.popleft()
                yield first, future.result()
                used -= nbytes(first)
                del first, future
            waiting.append((item, pool.submit(load, item)))
            used += size
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
            del first, future

    with ThreadPoolExecutor(threads, thread_name_prefix="dsv4q-read") as pool:
        try:
            yield results(pool)
        finally:
            for _, future in waiting:
                future.cancel()
