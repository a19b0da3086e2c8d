"""Thread pools with priorities, which reserve threads for light work."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class RankedPool(Executor):
    """An executor whose work has ranks: the lowest rank runs first, equal ranks in order of
    submission.

    Args:
        threads: maximum number of threads, started on demand.
        heavy: how many of them may run heavy work at a time.
        name: name of the threads.
    """

    def __init__(self, threads: int, heavy: int, name: str) -> None:
        self._most, self._most_heavy, self._name = threads, heavy, name
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._waiting: dict[bool, list[tuple[float, int, Future[Any], Callable[[], Any]]]]
        self._waiting = {False: [], True: []}
        self._number = itertools.count()
        self._heavy = 0
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        """Submit light work, with the current time as its rank."""
        return self.rank(partial(fn, *args, **named), time.monotonic())

    def rank(self, work: Callable[[], T], rank: float, *, heavy: bool = False) -> Future[T]:
        """Submit work with a rank; ``heavy`` work is limited to some of the threads."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool is shut down")
            heapq.heappush(self._waiting[heavy], (rank, next(self._number), future, work))
            if len(self._threads) < self._most:
                name = f"{self._name}-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
            self._changed.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after the waiting work is done or, with ``cancel_futures``, cancelled."""
        with self._changed:
            self._closed = True
            left = [*self._waiting[False], *self._waiting[True]] if cancel_futures else []
            self._changed.notify_all()
        for _, _, future, _ in left:
            future.cancel()
        if wait:
            for thread in self._threads:
                thread.join()

    def _next(self) -> bool | None:
        """Return whether the next work is heavy; None if nothing can run now."""
        light, heavy = self._waiting[False], self._waiting[True]
        if heavy and self._heavy < self._most_heavy and not (light and light[0] < heavy[0]):
            return True
        return False if light else None

    def _run(self) -> None:
        while True:
            with self._changed:
                while (heavy := self._next()) is None:
                    if self._closed and not self._waiting[True]:
                        return
                    self._changed.wait()
                _, _, future, work = heapq.heappop(self._waiting[heavy])
                self._heavy += heavy
            try:
                _do(future, work)
            finally:
                with self._changed:
                    self._heavy -= heavy
                    self._changed.notify_all()
            del future, work  # free what they hold while waiting


def _do(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(value)
