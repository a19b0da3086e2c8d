"""The growing results of one HTTP request, cancelled if the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from smolstack.generation.answer import Answer
from smolstack.generation.engine import Engine
from smolstack.generation.request import Request, Update
from smolstack.serve.metrics import Metrics

T = TypeVar("T")


class PendingAnswers:
    """The engine requests of one HTTP request, for answers or vectors.

    Iterating yields (index of the request, update) until all are complete. :meth:`close` must be
    called; it cancels the requests that are not complete.

    Args:
        requests: the engine requests, not yet queued.
        began: when the HTTP request arrived, in the time of time.perf_counter().
        pieces: whether to yield all updates, or only the first and last of each request.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        requests: Sequence[Request],
        *,
        began: float,
        pieces: bool = True,
    ) -> None:
        self._engine, self._metrics, self._pieces = engine, metrics, pieces
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self.requests, self._began, self._open = requests, began, 0
        self._has_first_token = False
        for index, request in enumerate(requests):
            request.listener = self._listener(index)

    def begin(self, client: str | None = None) -> None:
        """Queue the requests, ordered by their cost and their client's recent use.

        Raises:
            QueueFullError: too many requests are waiting.
        """
        self._engine.enter(self.requests, client=client)
        self._open = len(self.requests)

    def _listener(self, index: int) -> Callable[[Update], None]:
        begun = False

        def listen(update: Update) -> None:
            nonlocal begun
            if begun and not self._pieces and not update.last:
                return  # saves the event loop work
            begun = True
            with contextlib.suppress(RuntimeError):  # the loop ended before the answer
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return listen

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        while self._open:
            index, update = await self._updates.get()
            if update.error is not None:
                raise update.error
            if update.vectors is None and not self._has_first_token:
                self._has_first_token = True
                self._metrics.first_token.observe(time.perf_counter() - self._began)
            if update.last:
                self._open -= 1
                self._metrics.count_complete(self.requests[index])
            yield index, update

    @property
    def answers(self) -> list[Answer]:
        """The answers, once all are complete."""
        return [request.answered for request in self.requests]

    def close(self) -> None:
        """Cancel the requests that are not complete."""
        if self._open:
            self._metrics.abandoned.inc(self._open)
        for request in self.requests:
            self._engine.cancel(request)
        self._metrics.duration.observe(time.perf_counter() - self._began)


class EventStream(StreamingResponse):
    """A stream of server-sent events that closes its answers however it ends, even before the
    first event, for example because the client has disconnected."""

    def __init__(self, events: AsyncIterator[str], pending: PendingAnswers) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pending.close()


async def unless_disconnected(receive: Callable[[], Any], work: Any) -> Any:
    """Await ``work`` and return its result; None if the client disconnects first."""
    watching = asyncio.ensure_future(_disconnected(receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return None
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _disconnected(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def in_thread(executor: Executor | None, work: Callable[..., T], *args: Any) -> T:
    """Run a function in a thread of the executor and await its result."""
    return await asyncio.get_running_loop().run_in_executor(executor, partial(work, *args))
