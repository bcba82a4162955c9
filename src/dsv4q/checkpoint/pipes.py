"""Ahead and behind: the only queues of the house.

`loaded_ahead` loads the next items on threads while the caller is busy with one. `Behind` does what the caller hands
over while the caller goes on. Both bound what is under way by its cost, keep the order that they promise, raise the
first error of a thread on the caller's side, and end their threads when the context ends. A thread is never killed:
work that takes long asks `Behind.check` whether anybody still wants it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

K = TypeVar("K")
V = TypeVar("V")

BUDGET = 512 << 20
"""Bytes that are loaded or being loaded at once."""
THREADS = 4

_POLL = 0.1
"""Seconds between two looks at whether the run is to stop."""


def _never() -> None:
    """Nobody wants to stop, nothing has to be done first."""


@contextmanager
def loaded_ahead(
    items: Iterable[K],
    load: Callable[[K], V],
    cost: Callable[[K], int],
    *,
    budget: int = BUDGET,
    threads: int = THREADS,
    begin: Callable[[], None] = _never,
    check_stop: Callable[[], None] = _never,
) -> Iterator[Iterator[tuple[K, V]]]:
    """Each item with what `load` made of it, in order.

    Args:
        items: drawn from on the caller's thread, as far ahead as the budget allows.
        load: called on `threads` threads; its error is raised where the item would come.
        cost: of a loaded item, in bytes as a rule.
        budget: cost of all that is loaded and not yet done with; one item is always allowed, however dear. An item is
            done with when the next one is asked for.
        begin: called first on each thread.
        check_stop: called while an item is waited for; raises if the run shall stop.

    On leaving, no further load starts and those under way are waited for, so that files may be closed then.
    """
    waiting: deque[tuple[K, Future[V]]] = deque()

    def first() -> tuple[K, V]:
        item, future = waiting.popleft()
        while check_stop is not _never and not wait([future], timeout=_POLL).done:
            check_stop()
        return item, future.result()

    def results(pool: ThreadPoolExecutor) -> Iterator[tuple[K, V]]:
        used = 0
        for item in items:
            dear = cost(item)
            while waiting and used + dear > budget:
                used -= cost(waiting[0][0])
                yield first()
            waiting.append((item, pool.submit(load, item)))
            used += dear
        while waiting:
            yield first()

    with ThreadPoolExecutor(threads, "dsv4q-ahead", begin) as pool:
        try:
            yield results(pool)
        finally:
            for _, future in waiting:
                future.cancel()


class Stopped(Exception):
    """The context has ended with an error, and what is still done behind it does not matter any more."""


class Behind:
    """Work that is done on threads while the caller goes on; on one thread in the order of the calls.

    Args:
        threads: 0 does everything in the call itself.
        limit: cost of all that may be under way before `put` waits; one piece is always allowed, however dear.
        completes: what was put is done even if the context ends with an error of the caller.

    After an error in a thread nothing more is begun; it is raised by the next `put` or `drain`, or at the end of the
    context. `put` may be called from several threads.
    """

    def __init__(self, threads: int, limit: int, *, completes: bool = False) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dsv4q-behind") if threads else None
        self._limit, self._completes = limit, completes
        self._change = threading.Condition()
        """Guards what follows; notified when something is done."""
        self._under_way = 0
        self._error: BaseException | None = None
        self._stopped = threading.Event()

    def put(self, work: Callable[[], V], cost: int = 1) -> Future[V]:
        """Have `work` done; waits until there is room for its cost."""
        if self._pool is None:
            done: Future[V] = Future()
            done.set_result(work())
            return done
        with self._change:
            self._change.wait_for(lambda: self._error or not self._under_way or self._under_way + cost <= self._limit)
            self.raise_error()
            self._under_way += cost
            return self._pool.submit(self._do, work, cost)

    def _do(self, work: Callable[[], V], cost: int) -> V:
        try:
            self.raise_error()
            return work()
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            with self._change:
                self._under_way -= cost
                self._change.notify_all()

    def check(self) -> None:
        """For work to call that takes long.

        Raises:
            Stopped: nobody wants its result any more.
        """
        if self._stopped.is_set():
            raise Stopped

    def drain(self, check_stop: Callable[[], None] = _never) -> None:
        """Wait until all that was put is done; `check_stop` is called meanwhile and raises if the run shall stop."""
        with self._change:
            while self._under_way and not self._error:
                check_stop()
                self._change.wait(_POLL)
            self.raise_error()

    def raise_error(self) -> None:
        """Raise the error of a thread, if there was one."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        drop = error is not None and not self._completes
        if drop:
            self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=drop)
        if error is None:
            self.raise_error()
