"""Processes the windows of a job: a thread loads images while the model runs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from smolstack.bulk.batching import Limits, Planned, batches, chunks
from smolstack.bulk.input_listing import RowReader
from smolstack.bulk.partial_results import Journal, Parts
from smolstack.bulk.rows import Row, Window
from smolstack.bulk.tasks import Loaded, Task, sentence

T = TypeVar("T")
_END = object()


@dataclass
class _Step:
    """Loaded rows of a window, or its end (None)."""

    window: Window
    journal: Journal
    loaded: Loaded | None


def run_locally(
    pending: Iterable[Window],
    reader: RowReader,
    task: Task,
    parts: Parts,
    *,
    limits: Limits,
    done: Callable[[int], None],
) -> None:
    """Process every row without results in the given windows, and finish the windows.

    Args:
        done: called with the number of rows of each batch once their results are saved.
    """
    with contextlib.closing(load_ahead(_steps(pending, reader, task, parts, limits))) as steps:
        for step in steps:
            if step.loaded is None:
                parts.finish(step.window, task.schema)
                continue
            step.journal.append(task.work(step.loaded))
            done(len(step.loaded.rows) + len(step.loaded.errors))


def _steps(
    pending: Iterable[Window], reader: RowReader, task: Task, parts: Parts, limits: Limits
) -> Iterator[_Step]:
    for window in pending:
        journal = parts.journal(window)
        already = frozenset(journal.done)
        rows = (row for row in reader.read(window) if row.index not in already)
        for some in chunks(rows):
            planned, bad = _plan(some, task)
            if bad:
                yield _Step(window, journal, Loaded([], [], bad))
            for batch in batches(planned, limits):
                yield _Step(window, journal, task.load([entry.row for entry in batch]))
        yield _Step(window, journal, None)


def _plan(rows: Iterable[Row], task: Task) -> tuple[list[Planned], list[tuple[Row, str]]]:
    """Return the token count of each row, and the rows whose images cannot be planned."""
    planned, bad = [], []
    for row in rows:
        try:
            planned.append(Planned(row, task.plan(row)))
        except Exception as error:  # decoders raise many exception types for damaged files
            bad.append((row, sentence(error)))
    return planned, bad


def load_ahead(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """Yield the items, produced in a thread while the previous one is used; up to ``depth`` wait.

    Closing the generator ends the thread; exceptions of the thread are raised here.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stopped = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for item in items:
                ready.put(item)
                if stopped.is_set():
                    return
        except BaseException as error:  # re-raised in the waiting thread
            failed.append(error)
        ready.put(_END)

    thread = threading.Thread(target=run, name="load-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            yield item  # type: ignore[misc]
        if failed:
            raise failed[0]
    finally:
        stopped.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.05)  # make room, so that the thread can finish
            thread.join(0)
