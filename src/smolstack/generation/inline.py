"""The engine without its own thread: the threads that wait for answers step the core."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.errors import GenerationError, KVCacheError
from smolstack.generation.answer import Answer
from smolstack.generation.core import EngineCore
from smolstack.generation.request import Kind, Request, Update
from smolstack.generation.scheduler import SchedulerLimits
from smolstack.processor.processor import Prompt

# Callers wait for all answers: prompts are read completely before decoding starts.
INLINE = SchedulerLimits(running=64, queued=None, prefill_tokens=None, interleave=False)


class InlineEngine:
    """A core for any number of threads, each of which waits for its own requests.

    One of the waiting threads steps the core for all of them. A request that no thread waits for (a
    stream that is not read) is not processed.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._changed = threading.Condition(threading.Lock())
        self._inbox: list[Request] = []
        self._stepping = False

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers of requests, in order.

        Raises: the error of the first request that failed.
        """
        self.finish(requests)
        return [request.answered for request in requests]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[VisualTokens]]:
        """Return the visual tokens of each prompt's images, without reading the prompts.

        Raises:
            ImageError: an image cannot be decoded; raised before any network runs.
        """
        return [request.visual for request in self._results(prompts, "visual tokens")]

    def embed(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return each prompt's vectors of a retrieval model, (T, E) float32.

        Raises:
            ImageError: an image cannot be decoded; raised before any network runs.
        """
        requests = self._results(prompts, "vectors")
        return [request.vectors for request in requests if request.vectors is not None]

    def _results(self, prompts: Sequence[Prompt], kind: Kind) -> list[Request]:
        requests = [Request(prompt, kind) for prompt in prompts]
        self.core.open_images(requests)
        self.finish(requests)
        for request in requests:
            if request.error is not None:
                raise request.error
        return requests

    def finish(self, requests: Sequence[Request]) -> None:
        """Run until all requests are finished, with or without an error."""
        self.add(requests)
        try:
            self.run(requests, lambda: all(request.finished for request in requests))
        except BaseException:
            self.cancel(requests)
            raise

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests; they are processed when a thread waits for them."""
        for request in requests:
            request.paused = True
        with self._changed:
            self._inbox += requests

    def run(self, requests: Sequence[Request], until: Callable[[], bool]) -> None:
        """Step the core, or wait while another thread does, until the condition holds."""
        for request in requests:
            request.paused = False
        try:
            while not self._reached(until):
                worked = False
                try:
                    worked = self._step()
                finally:
                    with self._changed:
                        self._stepping = False
                        self._changed.notify_all()
                if not worked and not until():
                    raise KVCacheError(
                        f"the KV cache ({self.core.scheduler.kv_budget:,} bytes) is used by "
                        "streams that are not read to their end; read or close them"
                    )
        finally:
            for request in requests:
                request.paused = True

    def _reached(self, until: Callable[[], bool]) -> bool:
        """Wait while another thread steps the core; return False when this thread must do it."""
        with self._changed:
            while not until():
                if not self._stepping:
                    self._stepping = True
                    return False
                self._changed.wait()
            return True

    def _step(self) -> bool:
        with self._changed:
            new, self._inbox = self._inbox, []
        for request in new:
            if not request.cancelled:
                self.core.add(request)
        return self.core.step()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Stop the work on requests, and free what they hold."""
        for request in requests:
            request.cancelled = True
        # The thread that steps the core removes them before the next step.
        if self._changed.acquire(blocking=False):
            try:
                if not self._stepping:
                    self.core.remove_ended()
            finally:
                self._changed.release()


class AnswerStream:
    """Pieces of the answer to a request; iterate over it, then read ``answer``.

    Closing or deleting it stops the work.
    """

    def __init__(self, engine: InlineEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._updates: deque[Update] = deque()
        request.listener = self._updates.append
        engine.add([request])

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next characters that became final.

        Raises: the error that ended the answer.
        """
        while True:
            while self._updates:
                piece = self._updates.popleft().piece
                if piece:
                    return piece
            if self._request.finished or self._request.cancelled:
                if self._request.error is not None:
                    raise self._request.error
                raise StopIteration
            self._engine.run([self._request], lambda: bool(self._updates) or self._request.finished)

    @property
    def answer(self) -> Answer:
        """The answer; complete after the iteration."""
        if self._request.answer is None:
            raise GenerationError("the answer is not complete yet; iterate over the stream first")
        return self._request.answer

    def close(self) -> None:
        """Stop the work on the answer."""
        if not self._request.finished:
            self._engine.cancel([self._request])

    def __del__(self) -> None:
        if hasattr(self, "_request"):
            self.close()
