"""One chat request at work: its answers as they grow, given up when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from smolstack.generation.answer import Answer
from smolstack.generation.engine import Engine
from smolstack.generation.options import ReadOptions
from smolstack.generation.sequence import Update
from smolstack.processor.processor import Prompt
from smolstack.serve.metrics import Metrics


class Asking:
    """The answers to one request.

    Iterating gives (answer's index, update) until all are complete. :meth:`close` must be called:
    it stops the work of answers that nobody waits for any more.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        prompt: Prompt,
        options: list[ReadOptions],
        seconds: float,
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._began, self._open = time.perf_counter(), len(options)
        self._spoke = False
        self.answers: list[Answer | None] = [None] * len(options)
        self._sequences = engine.submit(
            prompt, options, [self._listener(i) for i in range(len(options))], seconds=seconds
        )

    def _listener(self, index: int) -> Callable[[Update], None]:
        loop = asyncio.get_running_loop()

        def listen(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended before the answer
                loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return listen

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        while self._open:
            index, update = await self._updates.get()
            if update.error is not None:
                raise update.error
            if not self._spoke:
                self._spoke = True
                self._metrics.first_token.observe(time.perf_counter() - self._began)
            if update.answer is not None:
                self.answers[index] = update.answer
                self._open -= 1
                self._metrics.count_answer(update.answer)
            yield index, update

    def close(self) -> None:
        """Stop what is still at work."""
        if self._open:
            self._metrics.abandoned.inc(self._open)
        for sequence in self._sequences:
            self._engine.cancel(sequence)
        self._metrics.duration.observe(time.perf_counter() - self._began)


async def unless_gone(receive: Callable[[], Any], work: Any) -> Any:
    """The result of awaiting ``work``, or None when the client went away first."""
    watching = asyncio.ensure_future(_gone(receive))
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


async def _gone(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def in_thread(executor: Any, work: Callable[..., Any], *args: Any) -> Any:
    """Await slow work that runs in an executor's thread."""
    return await asyncio.get_running_loop().run_in_executor(executor, partial(work, *args))
