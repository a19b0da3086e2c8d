"""The engine: a core stepped by a thread of its own, for requests from any thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future

from smolstack.errors import GenerationError, QueueFullError
from smolstack.generation.answer import Answer
from smolstack.generation.core import EngineCore
from smolstack.generation.costs import urgency
from smolstack.generation.image_cache import ImageCache
from smolstack.generation.pools import RankedPool
from smolstack.generation.request import Request, Update
from smolstack.generation.scheduler import SchedulerLimits
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor

_IMAGE_THREADS, _LARGE_IMAGES = 3, 2  # so many at once, and large ones of them
_LOOK = 0.1  # seconds between looks at deadlines while nothing can be done


class Engine:
    """Many requests at once, submitted from any thread; :meth:`smolstack.VLM.engine` makes one.

    As a context manager it finishes what was submitted before it ends.

    Attributes:
        core: its counters may be read from any thread; it is stepped by this engine alone.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        limits: SchedulerLimits | None = None,
        *,
        images: ImageCache | None = None,
    ) -> None:
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._news = self._closing = False
        self._workers = RankedPool(_IMAGE_THREADS, _LARGE_IMAGES, "images")
        self.core = EngineCore(
            model, processor, limits, images=images, workers=self._workers, wake=self._wake
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close(drain=raised[0] is None)

    def submit(self, request: Request, *, seconds: float | None = None) -> Future[Answer]:
        """Let a request (:meth:`smolstack.VLM.request`) wait for its turn.

        Args:
            seconds: how long the answer may take.

        Returns:
            The answer to come. ``cancel()`` stops the work on it.

        Raises:
            QueueFullError: too many wait already, or the engine is closing.
            KVCacheError: the request takes more KV cache than the engine may use.
        """
        future: Future[Answer] = Future()

        def listen(update: Update) -> None:
            if not (update.answer or update.error) or not future.set_running_or_notify_cancel():
                return
            if update.error is not None:
                future.set_exception(update.error)
            elif update.answer is not None:
                future.set_result(update.answer)

        self._enter_one(request, listen, seconds)
        future.add_done_callback(lambda done: self.cancel(request) if done.cancelled() else None)
        return future

    async def stream(self, request: Request, *, seconds: float | None = None) -> AsyncIterator[str]:
        """Pieces of an answer as they come, in asyncio; ``request.answer`` is complete after them.

        Who stops iterating stops the work (``aclose``).

        Raises: as :meth:`submit`, and the error that ended the answer.
        """
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update] = asyncio.Queue()

        def listen(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended before the answer
                loop.call_soon_threadsafe(updates.put_nowait, update)

        self._enter_one(request, listen, seconds)
        try:
            while True:
                update = await updates.get()
                if update.error is not None:
                    raise update.error
                if update.piece:
                    yield update.piece
                if update.answer is not None:
                    return
        finally:
            self.cancel(request)

    def _enter_one(
        self, request: Request, listen: Callable[[Update], None], seconds: float | None
    ) -> None:
        if request.listener is not None:
            raise GenerationError("the request was submitted before, expected a new one")
        self.core.scheduler.check(request)
        if seconds is not None:
            if not isinstance(seconds, (int, float)) or math.isnan(seconds):
                raise GenerationError(f"seconds is {seconds!r}, expected a number")
            request.deadline = time.monotonic() + seconds
        request.listener = listen
        try:
            self.enter([request])
        except QueueFullError:
            request.listener = None  # it may be submitted again
            raise

    def enter(self, requests: Sequence[Request], *, client: str | None = None) -> None:
        """Let requests wait for their turn, each with its listener; all or none.

        Args:
            client: whose they are. Requests of clients have their turn by what they cost and by
                what their clients had lately, and where too many wait, those of the highest rank
                give way to them; others have their turn in the order of their arrival, at once.

        Raises:
            QueueFullError: too many wait already, or the engine is closing.
        """
        with self._changed:
            if client is not None:
                self._rank(requests, client)
                for request in self.core.scheduler.displaced(requests, self._inbox):
                    request.given_up = QueueFullError(
                        "the request gave way to cheaper ones; send it again later"
                    )
            self._check_room(len(requests))
            self._inbox += requests
            self._news = True
            self._changed.notify()

    def _rank(self, requests: Sequence[Request], client: str) -> None:
        core, now = self.core, time.monotonic()
        cost = core.costs.of(requests)
        for request in requests:
            request.client, request.cost = client, cost
            request.urgency = request.rank = urgency(now, cost)
        waiting = [*core.scheduler.waiting, *core.scheduler.running]
        core.shares.rank([*waiting, *requests], now)
        core.shares.charge(client, cost, now)

    def check_room(self, requests: int = 1) -> None:
        """Raises QueueFullError when so many more could not be submitted now."""
        with self._changed:
            self._check_room(requests)

    def _check_room(self, requests: int) -> None:
        if self._closing:
            raise QueueFullError("the engine is shutting down")
        self.core.scheduler.check_room(requests, self._inbox)

    def cancel(self, request: Request) -> None:
        """Stop the work on a request; nothing more is told about it."""
        request.cancelled = True
        self._wake()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.core.scheduler.waiting) + len(self._inbox)

    @property
    def running(self) -> int:
        """Requests at work."""
        return len(self.core.scheduler.running)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is at work."""
        return self._thread.is_alive()

    def close(self, *, drain: bool = True) -> None:
        """Take nothing new, finish what was submitted (or give it up), and end the thread."""
        requests = self._end()
        if not drain:
            for request in requests:
                request.given_up = QueueFullError("the engine was closed")
            self._wake()
        self._thread.join()
        self._workers.shutdown(cancel_futures=True)

    def give_up(self, error: Exception) -> None:
        """Take nothing new, and tell everybody who waits or is at work that there is no answer."""
        for request in self._end():
            request.given_up = error
        self._wake()

    def _end(self) -> list[Request]:
        """Take nothing new; what was submitted so far."""
        with self._changed:
            self._closing = True
            self._news = True
            self._changed.notify()
            return [*self._inbox, *self.core.scheduler.waiting, *self.core.scheduler.running]

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            # Nobody may wait for ever for an engine that has ended.
            for request in self._end():
                request.tell(Update(error=GenerationError(f"the engine stopped: {error!r}")))
            raise

    def _work(self) -> None:
        while True:
            with self._changed:
                for request in self._inbox:
                    self.core.add(request)
                self._inbox.clear()
                self._news = False
            worked = self.core.step()
            with self._changed:
                if self._closing and not self._inbox and self.core.idle:
                    return
                if not worked and not self._news:
                    # Images in other threads wake it; deadlines need a look now and then.
                    self._changed.wait(None if self.core.idle else _LOOK)
