"""From a parsed request to its response, for all forms of OpenAI's API."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeAlias

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from smolstack.errors import DeadlineError
from smolstack.generation.answer import Answer
from smolstack.generation.engine import Engine
from smolstack.generation.options import ReadOptions
from smolstack.generation.pools import RankedPool
from smolstack.generation.request import Update
from smolstack.processor.processor import Prompt
from smolstack.serve import request_reader
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

# Makes the prompt and the options of each answer from a request and its images.
MakePrompts: TypeAlias = Callable[
    [VLM, ChatRequest, list[Media], ServerSettings], tuple[list[Prompt], list[ReadOptions]]
]
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
        seconds = min(body.deadline or math.inf, self.settings.deadline)
        if isinstance(request, JsonRequest):
            request.release_body()
        try:
            client = client_of(request, self.settings)
            made = self.read_limiter.read(
                self._read(body, seconds, make_prompts, characters), client
            )
            pending = await unless_disconnected(request.receive, made)
            if pending is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            pending.begin(client)
        except Exception as error:
            raise as_refusal(error, self._retry_after()) from None
        if body.stream:
            return await self._stream(request, pending, writer())
        try:
            whole = await unless_disconnected(request.receive, _whole(pending, writer()))
        except Exception as error:
            raise as_refusal(error) from None
        finally:
            pending.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST) if whole is None else whole

    async def _read(
        self, body: ChatRequest, seconds: float, make_prompts: MakePrompts, characters: int
    ) -> PendingAnswers:
        """Return the request's answers after its images are read and all checks are done."""
        deadline = time.monotonic() + seconds
        pending = PendingAnswers(self.engine, self.metrics, pieces=bool(body.stream))

        def make(images: list[Media]) -> None:
            pending.make(*make_prompts(self.vlm, body, images, self.settings), deadline)

        async def read_inputs() -> None:
            urls = request_reader.media_urls(body, self.settings)
            images = [await request_reader.read_media(url, self.settings) for url in urls]
            urls.clear()
            request_reader.release_media(body)
            await in_pool(self.readers, reading_seconds(body, characters), make, images)

        try:
            await asyncio.wait_for(read_inputs(), seconds)
        except asyncio.TimeoutError:
            raise DeadlineError("the deadline passed while the request was being read") from None
        return pending

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
                yield writer.begin(len(pending.answers))
                yield writer.update(*first)
                async for index, update in updates:
                    yield writer.update(index, update)
                yield writer.end(pending.complete)
            except Exception as error:
                yield writer.failed(as_refusal(error))

        return EventStream(events(), pending)

    def _retry_after(self) -> int:
        """Estimate the seconds until the present queue is processed, for Retry-After."""
        ahead = self.engine.queued + self.engine.running
        seconds = ahead * self.metrics.mean_seconds / self.settings.scheduler.running
        return max(1, min(60, math.ceil(seconds)))


async def _whole(pending: PendingAnswers, writer: Writer) -> Response:
    async for _ in pending:
        pass
    answers = pending.complete
    if all(answer.logprobs is None for answer in answers):
        return JSONResponse(writer.whole(answers))
    # Formatting thousands of log-probabilities would keep the event loop waiting for seconds.
    return await in_thread(None, lambda: JSONResponse(writer.whole(answers)))
