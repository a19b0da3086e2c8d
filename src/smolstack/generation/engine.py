"""A thread that runs the scheduler, for callers in other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from smolstack.errors import QueueFullError
from smolstack.generation.answering import Answering, Form
from smolstack.generation.options import ReadOptions
from smolstack.generation.scheduler import Scheduler, SchedulerLimits
from smolstack.generation.sequence import Sequence, Update
from smolstack.processor.processor import Prompt

_PICTURE_THREADS = 2
_LOOK = 0.1  # seconds between looks at deadlines while nothing can be done


class Engine:
    """Many answers at once, asked for from any thread.

    Attributes:
        scheduler: its counters may be read from any thread; it is stepped by this one alone.
    """

    def __init__(self, answering: Answering, limits: SchedulerLimits | None = None) -> None:
        self._changed = threading.Condition()
        self._inbox: list[Sequence] = []
        self._news = self._closing = False
        self._workers = ThreadPoolExecutor(_PICTURE_THREADS, thread_name_prefix="pictures")
        self.scheduler = Scheduler(answering, limits, workers=self._workers, wake=self._wake)
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt,
        options: list[ReadOptions],
        listeners: list[Callable[[Update], None]],
        *,
        seconds: float | None = None,
    ) -> list[Sequence]:
        """Ask for one answer per entry of ``options``: :meth:`make`, then :meth:`enter`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        sequences = self.make(prompt, options, listeners, deadline=deadline)
        self.enter(sequences)
        return sequences

    def make(
        self,
        prompt: Prompt,
        options: list[ReadOptions],
        listeners: list[Callable[[Update], None]],
        *,
        deadline: float | None = None,
    ) -> list[Sequence]:
        """Answers to one prompt that do not wait yet. A large form takes its time to compile.

        Args:
            listeners: one per answer, called in the engine's thread; they must be quick.
            deadline: when an answer must be complete, on time.monotonic's clock.

        Raises:
            ContextLengthError, GenerationError: the prompt or its options cannot be answered.
        """
        answering = self.scheduler.answering
        form = Form(answering, options[0])
        return [
            Sequence(answering, prompt, one, listener, deadline=deadline, form=form)
            for one, listener in zip(options, listeners, strict=True)
        ]

    def enter(self, sequences: list[Sequence]) -> None:
        """Let answers wait for their turn; all or none.

        Raises:
            QueueFullError: too many wait already, or the engine is closing.
        """
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is shutting down")
            self.scheduler.check_room(len(sequences) + len(self._inbox))
            self._inbox += sequences
            self._news = True
            self._changed.notify()

    def check_room(self, sequences: int = 1) -> None:
        """Raises QueueFullError when so many more could not be asked for now."""
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is shutting down")
            self.scheduler.check_room(sequences + len(self._inbox))

    def cancel(self, sequence: Sequence) -> None:
        """Stop an answer's work; nothing more is told about it."""
        sequence.cancelled = True
        self._wake()

    @property
    def queued(self) -> int:
        """Answers that wait."""
        return len(self.scheduler.waiting) + len(self._inbox)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is at work."""
        return self._thread.is_alive()

    def close(self, *, drain: bool = True) -> None:
        """Take nothing new, finish what was asked for (or give it up), and end the thread."""
        sequences = self._end()
        if not drain:
            for sequence in sequences:
                sequence.cancelled = True
            self._wake()
        self._thread.join()
        self._workers.shutdown(cancel_futures=True)

    def give_up(self, error: Exception) -> None:
        """Take nothing new, and tell everybody who waits or is at work that there is no answer."""
        for sequence in self._end():
            sequence.given_up = error
        self._wake()

    def _end(self) -> list[Sequence]:
        """Take nothing new; what was asked for so far."""
        with self._changed:
            self._closing = True
            self._news = True
            self._changed.notify()
            return [*self._inbox, *self.scheduler.waiting, *self.scheduler.running]

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                for sequence in self._inbox:
                    self.scheduler.add(sequence)
                self._inbox.clear()
                self._news = False
            worked = self.scheduler.step()
            with self._changed:
                if self._closing and not self._inbox and self.scheduler.idle:
                    return
                if not worked and not self._news:
                    # Pictures in other threads wake it; deadlines need a look now and then.
                    self._changed.wait(None if self.scheduler.idle else _LOOK)
