"""The engine: a core that runs in its own thread and accepts requests from any thread."""

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

_IMAGE_THREADS, _LARGE_IMAGES = 3, 2  # threads, and how many of them may open large images
_LOOK = 0.1  # seconds between checks of deadlines while idle


class Engine:
    """Processes requests submitted from any thread; made by :meth:`smolstack.VLM.engine`.

    As a context manager, it finishes all submitted requests on exit.

    Attributes:
        core: its counters may be read from any thread; only this engine may step it.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        limits: SchedulerLimits | None = None,
        *,
        image_cache: ImageCache | None = None,
    ) -> None:
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._news = self._closing = False
        self._workers = RankedPool(_IMAGE_THREADS, _LARGE_IMAGES, "images")
        self.core = EngineCore(
            model,
            processor,
            limits,
            image_cache=image_cache,
            workers=self._workers,
            wake=self._wake,
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close(drain=raised[0] is None)

    def submit(self, request: Request, *, seconds: float | None = None) -> Future[Answer]:
        """Queue a request (:meth:`smolstack.VLM.request`).

        Args:
            seconds: time limit of the answer.

        Returns:
            A future of the answer; ``cancel()`` stops the work on it.

        Raises:
            QueueFullError: too many requests are waiting, or the engine is closing.
            KVCacheError: the request needs more KV cache than the engine may use.
            GenerationError: the request is not for an answer, or was submitted before.
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
        """Yield pieces of an answer in asyncio; afterwards ``request.answer`` is complete.

        Closing the iterator (``aclose``) stops the work.

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
        if request.kind != "answer":
            raise GenerationError(
                f"the request is for {request.kind}, expected one for an answer; for others, use "
                "embed_pages, embed_queries or encode"
            )
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
        """Queue requests, each with its listener; all or none.

        Args:
            client: the client's name. Requests of clients are ordered by their cost and their
                client's recent use; if too many are waiting, those with the highest rank are
                displaced. Requests without a client are processed in order of arrival.

        Raises:
            QueueFullError: too many requests are waiting, or the engine is closing.
        """
        with self._changed:
            if client is not None:
                self._rank(requests, client)
                for request in self.core.scheduler.displaced(requests, self._inbox):
                    request.abort_error = QueueFullError(
                        "the request was displaced by cheaper ones; send it again later"
                    )
            self._check_room(len(requests))
            self._inbox += requests
            self._news = True
            self._changed.notify()

    def _rank(self, requests: Sequence[Request], client: str) -> None:
        core, now = self.core, time.monotonic()
        cost = core.costs.estimate(requests)
        for request in requests:
            request.client, request.cost = client, cost
            request.urgency = request.rank = urgency(now, cost)
        waiting = [*core.scheduler.waiting, *core.scheduler.running, *self._inbox]
        core.client_use.rank([*waiting, *requests], now)
        core.client_use.charge(client, cost, now)

    def check_room(self, requests: int = 1) -> None:
        """Raise QueueFullError if the given number of requests cannot be queued now."""
        with self._changed:
            self._check_room(requests)

    def _check_room(self, requests: int) -> None:
        if self._closing:
            raise QueueFullError("the engine is shutting down")
        self.core.scheduler.check_room(requests, self._inbox)

    def cancel(self, request: Request) -> None:
        """Stop the work on a request; its listener gets no further updates."""
        request.cancelled = True
        self._wake()

    @property
    def queued(self) -> int:
        """Number of waiting requests."""
        return len(self.core.scheduler.waiting) + len(self._inbox)

    @property
    def running(self) -> int:
        """Number of running requests."""
        return len(self.core.scheduler.running)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    def close(self, *, drain: bool = True) -> None:
        """Accept no new requests, finish (or abort) those submitted, and end the thread."""
        requests = self._end()
        if not drain:
            for request in requests:
                request.abort_error = QueueFullError("the engine was closed")
            self._wake()
        self._thread.join()
        self._workers.shutdown(cancel_futures=True)

    def abort(self, error: Exception) -> None:
        """Accept no new requests, and end all waiting and running requests with an error."""
        for request in self._end():
            request.abort_error = error
        self._wake()

    def _end(self) -> list[Request]:
        """Accept no new requests; return all that are not finished."""
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
            # No caller may wait indefinitely for an engine that has ended.
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
                    # Image threads wake it; deadlines must be checked periodically.
                    self._changed.wait(None if self.core.idle else _LOOK)
