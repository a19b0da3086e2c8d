"""From a parsed request to its response, for all forms of OpenAI's API."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from smolstack.errors import DeadlineError, GenerationError
from smolstack.generation.answer import Answer
from smolstack.generation.engine import Engine
from smolstack.generation.options import ValidatedOptions
from smolstack.generation.pools import RankedPool
from smolstack.generation.request import Request as EngineRequest
from smolstack.generation.request import Update
from smolstack.processor.processor import Prompt
from smolstack.serve import request_options, request_reader
from smolstack.serve.admission import ReadLimiter, client_of, in_pool, reading_seconds
from smolstack.serve.error_responses import RefusedError, as_refusal
from smolstack.serve.media import Media
from smolstack.serve.metrics import Metrics
from smolstack.serve.parsing import JsonRequest
from smolstack.serve.pending_answers import (
    EventStream,
    PendingAnswers,
    in_thread,
    unless_disconnected,
)
from smolstack.serve.schemas import ChatRequest
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM

T = TypeVar("T")
# Makes the prompt and the options of each answer from a request and its images.
MakePrompts: TypeAlias = Callable[
    [VLM, ChatRequest, list[Media], ServerSettings], tuple[list[Prompt], list[ValidatedOptions]]
]
# Reads a request and makes its engine requests with this deadline, in the time of time.monotonic().
ReadRequests: TypeAlias = Callable[[float], Coroutine[Any, Any, list[EngineRequest]]]
CLIENT_CLOSED_REQUEST = 499  # status of responses to clients that have disconnected, for logs


class Writer(Protocol):
    """Formats the answers to one request.

    A stream consists of the text from ``begin``, from ``update`` for each update, and from ``end``,
    or from ``failed`` if an error ends it. Each text contains any number of server-sent events.
    """

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body of a response without streaming."""

    def begin(self, count: int) -> str:
        """Return the events at the start of a stream of ``count`` answers."""

    def update(self, index: int, update: Update) -> str:
        """Return the events for an update of one answer."""

    def end(self, answers: Sequence[Answer]) -> str:
        """Return the events at the end of the stream."""

    def failed(self, refusal: RefusedError) -> str:
        """Return the event for an error within a stream."""


class RequestHandler:
    """Reads requests, submits them to the engine and returns the formatted answers."""

    def __init__(
        self,
        vlm: VLM,
        settings: ServerSettings,
        engine: Engine,
        metrics: Metrics,
        readers: RankedPool,
    ) -> None:
        self.vlm, self.settings = vlm, settings
        self.engine, self.metrics, self.readers = engine, metrics, readers
        waiting = settings.scheduler.queued
        limit = None if waiting is None else max(64, settings.scheduler.running + waiting)
        self.read_limiter = ReadLimiter(limit)

    async def answer(
        self,
        body: ChatRequest,
        request: Request,
        writer: Callable[[], Writer],
        *,
        make_prompts: MakePrompts = request_reader.chat_prompts,
        characters: int = 0,
    ) -> Response:
        """Return the response to a request, complete or as server-sent events.

        Args:
            body: the request as a chat; without messages if ``make_prompts`` provides the prompts.
            writer: makes the writer, called once the request has been found valid.
            make_prompts: makes the prompts and options; called in a worker thread.
            characters: total length of prompts that are not messages.

        Raises:
            RefusedError: the request is refused or failed.
        """
        pieces = bool(body.stream)

        async def read(deadline: float) -> list[EngineRequest]:
            def make(images: list[Media]) -> list[EngineRequest]:
                try:
                    made = make_prompts(self.vlm, body, images, self.settings)
                    return self.engine.core.requests(*made, deadline=deadline)
                except GenerationError as error:
                    refusal = request_options.placed(error, body)
                raise refusal

            urls = request_reader.media_urls(body)
            images = await request_reader.read_all(urls, self.settings)
            urls.clear()
            request_reader.release_media(body)
            return await in_pool(self.readers, reading_seconds(body, characters), make, images)

        pending = await self.begin(request, read, seconds=body.deadline, pieces=pieces)
        if pending is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if pieces:
            return await self._stream(request, pending, writer())
        made = writer()
        return await self.complete(request, pending, lambda: made.whole(pending.answers))

    async def begin(
        self,
        request: Request,
        read: ReadRequests,
        *,
        seconds: float | None = None,
        pieces: bool = False,
    ) -> PendingAnswers | None:
        """Read a request and queue its engine requests; return None if the client disconnects
        first. The caller must close what is returned.

        Args:
            read: checks the request and makes the engine requests, given their deadline.
            seconds: the request's own time limit; the server's applies as well.
            pieces: as :class:`PendingAnswers`.

        Raises:
            RefusedError: the request is refused, or not read before its deadline.
        """
        began = time.perf_counter()
        requests = await self.read(request, read, seconds=seconds)
        if requests is None:
            return None
        try:
            pending = PendingAnswers(
                self.engine, self.metrics, requests, began=began, pieces=pieces
            )
            pending.begin(client_of(request, self.settings))
        except Exception as error:
            raise as_refusal(error, self._retry_after()) from None
        return pending

    async def read(
        self,
        request: Request,
        work: Callable[[float], Coroutine[Any, Any, T]],
        *,
        seconds: float | None = None,
    ) -> T | None:
        """Read a request within the limits of number and time, and return the result; None if the
        client disconnects first.

        Args:
            work: reads the request, given its deadline in the time of time.monotonic().
            seconds: the request's own time limit; the server's applies as well.

        Raises:
            RefusedError: the request is refused, or not read before its deadline.
        """
        if isinstance(request, JsonRequest):
            request.release_body()
        seconds = min(seconds or math.inf, self.settings.deadline)
        try:
            client = client_of(request, self.settings)
            reading = self.read_limiter.read(_in_time(work, seconds), client)
            found: T | None = await unless_disconnected(request.receive, reading)
        except Exception as error:
            raise as_refusal(error, self._retry_after()) from None
        return found

    async def complete(
        self, request: Request, pending: PendingAnswers, body: Callable[[], dict[str, Any]]
    ) -> Response:
        """Await the results, close them and return the response.

        Args:
            body: makes the response's body from the results; it may be called in a thread.

        Raises:
            RefusedError: a result ended with an error.
        """
        try:
            whole = await unless_disconnected(request.receive, _whole(pending, body))
        except Exception as error:
            raise as_refusal(error) from None
        finally:
            pending.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST) if whole is None else whole

    async def _stream(self, request: Request, pending: PendingAnswers, writer: Writer) -> Response:
        """Stream the answers. An error before the first token still sets the HTTP status."""
        updates = aiter(pending)
        try:
            first = await unless_disconnected(request.receive, anext(updates))
        except Exception as error:
            pending.close()
            raise as_refusal(error) from None
        except BaseException:
            pending.close()
            raise
        if first is None:
            pending.close()
            return Response(status_code=CLIENT_CLOSED_REQUEST)

        async def events() -> AsyncIterator[str]:
            try:
                yield writer.begin(len(pending.requests))
                yield writer.update(*first)
                async for index, update in updates:
                    yield writer.update(index, update)
                yield writer.end(pending.answers)
            except Exception as error:
                yield writer.failed(as_refusal(error))

        return EventStream(events(), pending)

    def _retry_after(self) -> int:
        """Estimate the seconds until the present queue is processed, for Retry-After."""
        ahead = self.engine.queued + self.engine.running
        seconds = ahead * self.metrics.mean_seconds / self.settings.scheduler.running
        return max(1, min(60, math.ceil(seconds)))


async def _in_time(work: Callable[[float], Coroutine[Any, Any, T]], seconds: float) -> T:
    try:
        return await asyncio.wait_for(work(time.monotonic() + seconds), seconds)
    except asyncio.TimeoutError:
        raise DeadlineError("the deadline passed while the request was being read") from None


async def _whole(pending: PendingAnswers, body: Callable[[], dict[str, Any]]) -> Response:
    async for _ in pending:
        pass
    if all(each.kind == "answer" and each.answered.logprobs is None for each in pending.requests):
        return JSONResponse(body())
    # Formatting thousands of log-probabilities or vectors would keep the event loop waiting for
    # seconds.
    return await in_thread(None, lambda: JSONResponse(body()))
