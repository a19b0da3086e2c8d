"""The routes: chat completions, models, plans, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from smolstack import __version__
from smolstack.errors import DeadlineError
from smolstack.generation.engine import Engine
from smolstack.generation.pools import RankedPool
from smolstack.processor.decoding_memory import MEMORY
from smolstack.serve import embeddings, functions, plans, request_reader, tokens, validation_errors
from smolstack.serve.answers import Asking, EventStream, in_thread, unless_gone
from smolstack.serve.bodies import Bodies
from smolstack.serve.completions import Completion
from smolstack.serve.entrance import Entrance, client_of, in_pool, reading_seconds
from smolstack.serve.error_responses import RefusedError, add_handlers, as_refusal
from smolstack.serve.media import Media, MediaUrl
from smolstack.serve.metrics import Metrics
from smolstack.serve.middleware import Guard
from smolstack.serve.parsing import JsonRequest, JsonRoute
from smolstack.serve.schemas import ChatRequest, PlanRequest
from smolstack.serve.settings import ServerSettings
from smolstack.serve.tool_calls import CallingCompletion
from smolstack.vlm import VLM

_READING_THREADS, _LONG_READING = 3, 1  # so many at once, and long ones of them
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request cannot be answered; the error says why.",
        401: "The API key is missing or wrong.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "Too many answers wait; Retry-After says when to come back.",
        503: "The server is shutting down.",
        504: "The answer took longer than its deadline.",
    }.items()
}


class Server:
    """A model behind routes.

    Attributes:
        app: the ASGI application.
        engine: where answers are made.
    """

    def __init__(self, vlm: VLM, settings: ServerSettings) -> None:
        self.vlm, self.settings = vlm, settings
        MEMORY.limit = settings.decode_bytes
        self._before = vlm.processor.special_tokens_in_text
        vlm.processor.special_tokens_in_text = settings.special_tokens_in_text
        images = vlm.image_cache
        images.max_bytes = settings.image_cache_bytes
        self.engine = Engine(vlm.model, vlm.processor, settings.scheduler, images=images)
        self.metrics = Metrics(self.engine)
        self.readers = RankedPool(_READING_THREADS, _LONG_READING, "reading")
        waiting = settings.scheduler.queued
        together = None if waiting is None else max(64, settings.scheduler.running + waiting)
        self.entrance = Entrance(together)
        # FastAPI's own pages about the description load their scripts from elsewhere.
        self.app = FastAPI(
            title="smolstack",
            version=__version__,
            lifespan=self._lifespan,
            docs_url=None,
            redoc_url=None,
        )
        add_handlers(self.app)
        validation_errors.add_handlers(self.app)
        self.app.router.route_class = JsonRoute
        self.bodies = Bodies(settings.bodies_bytes)
        self.app.add_middleware(
            Guard, settings=settings, count=self.metrics.count_response, bodies=self.bodies
        )
        if settings.origins:
            # Outermost, so that refusals can be read by the pages that are let in, too.
            self.app.add_middleware(
                CORSMiddleware,
                allow_origins=list(settings.origins),
                allow_methods=["GET", "HEAD", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            )
        self._add_routes()

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        # Requests have ended or were given up by now.
        await in_thread(None, self.close)

    def close(self) -> None:
        """End the engine's work, and leave the model as it was."""
        self.vlm.processor.special_tokens_in_text = self._before
        self.engine.close(drain=False)
        self.readers.shutdown(cancel_futures=True)

    def _add_routes(self) -> None:
        app = self.app
        errors = {"responses": _ERRORS}
        app.post("/v1/chat/completions", response_model=None, **errors)(self.chat)  # type: ignore[arg-type]
        app.get("/v1/models", responses={401: _ERRORS[401]})(self.models)
        app.get("/v1/models/{model:path}", responses={401: _ERRORS[401], 404: {}})(self.one_model)
        app.post("/plan", response_model=None, **errors)(self.plan)  # type: ignore[arg-type]
        embeddings.add_route(app, self.vlm, self.settings, self.engine, self.readers, errors=errors)
        tokens.add_routes(app, self.vlm, self.settings, self.readers, errors)
        app.get("/health", responses={503: _ERRORS[503]})(self.health)
        app.get("/version")(self.version)
        app.get("/metrics", response_model=None)(self.show_metrics)
        for path, name, kind in (
            ("/", "page.html", "text/html"),
            ("/page.js", "page.js", "text/javascript"),
            ("/page.css", "page.css", "text/css"),
        ):
            app.get(path, include_in_schema=False, response_model=None)(_file(name, kind))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a chat, whole or as server-sent events."""
        seconds = min(body.deadline or math.inf, self.settings.deadline)
        if isinstance(request, JsonRequest):
            request.forget()
        try:
            made = self.entrance.read(self._made(body, seconds))
            asking = await unless_gone(request.receive, made)
            if asking is None:
                return _gone()
            asking.begin(client_of(request, self.settings))
        except Exception as error:
            raise as_refusal(error, self._retry_after()) from None
        kind = CallingCompletion if functions.offered(body) else Completion
        completion = kind(body.model or self.settings.name, self.vlm.processor.tokenizer)
        if body.stream:
            return await self._stream(body, request, asking, completion)
        try:
            whole = await unless_gone(request.receive, _whole(asking, completion))
        except Exception as error:
            raise as_refusal(error) from None
        finally:
            asking.close()
        return _gone() if whole is None else JSONResponse(whole)

    async def _made(self, body: ChatRequest, seconds: float) -> Asking:
        """The answers to a request, once its images are here and everything was checked."""
        deadline = time.monotonic() + seconds
        asking = Asking(self.engine, self.metrics, pieces=bool(body.stream))

        async def reading_it() -> None:
            urls = request_reader.image_urls(body, self.settings)
            images = [await request_reader.read_image(url, self.settings) for url in urls]
            urls.clear()
            request_reader.forget_images(body)
            took = reading_seconds(body)
            await in_pool(self.readers, took, self._prepare, body, images, asking, deadline)

        try:
            await asyncio.wait_for(reading_it(), seconds)
        except asyncio.TimeoutError:
            raise DeadlineError("the request was not read before its deadline") from None
        return asking

    def _prepare(
        self, body: ChatRequest, images: list[bytes], asking: Asking, deadline: float
    ) -> None:
        prompt, options = request_reader.prepare(self.vlm, body, images, self.settings)
        asking.make(prompt, options, deadline)

    async def _stream(
        self, body: ChatRequest, request: Request, asking: Asking, completion: Completion
    ) -> Response:
        """The same as events. What fails before the first token still has a status of its own."""
        updates = aiter(asking)
        try:
            first = await unless_gone(request.receive, anext(updates))
        except Exception as error:
            asking.close()
            raise as_refusal(error) from None
        except BaseException:
            asking.close()
            raise
        if first is None:
            asking.close()
            return _gone()
        usage = body.stream_options is not None and body.stream_options.include_usage

        async def events() -> AsyncIterator[str]:
            try:
                for index in range(len(asking.answers)):
                    yield _event(completion.first_chunk(index))
                yield _update_event(completion, *first)
                async for index, update in updates:
                    yield _update_event(completion, index, update)
                if usage:
                    answers = [answer for answer in asking.answers if answer is not None]
                    yield _event(completion.usage_chunk(answers))
                yield "data: [DONE]\n\n"
            except Exception as error:
                yield _event(as_refusal(error).body())

        return EventStream(events(), asking)

    def _retry_after(self) -> int:
        """Seconds until somebody who waits now would have left, by a mean answer's work."""
        ahead = self.engine.queued + self.engine.running
        seconds = ahead * self.metrics.mean_seconds / self.settings.scheduler.running
        return max(1, min(60, math.ceil(seconds)))

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, model: str) -> dict[str, Any]:
        """The same, by its name."""
        if model != self.settings.name:
            raise RefusedError(
                404, f"there is no model {model[:100]!r}, only {self.settings.name!r}"
            )
        return self._model()

    def _model(self) -> dict[str, Any]:
        text = self.vlm.config.text
        return {
            "id": self.settings.name,
            "object": "model",
            "created": 0,
            "owned_by": "smolstack",
            "context_length": text.max_positions,
        }

    async def plan(self, body: PlanRequest) -> dict[str, Any]:
        """How an image becomes tiles and tokens, before any network runs."""
        try:
            found: Media | tuple[int, int]
            if body.image_url is not None and body.video_url is not None:
                raise RefusedError(400, "found image_url and video_url, expected one of them")
            if body.image_url is not None:
                found = await request_reader.read_image(body.image_url.url, self.settings)
                body.image_url.url = ""
            elif body.video_url is not None:
                where = MediaUrl(body.video_url.url, "video_url", "video")
                found = await request_reader.read_image(where, self.settings)
                body.video_url.url = ""
            elif body.width and body.height:
                found = (body.width, body.height)
            else:
                raise RefusedError(400, "found none of image_url, video_url, and width and height")
            return await in_thread(
                self.readers, plans.planned, self.vlm, found, body, self.settings
            )
        except Exception as error:
            raise as_refusal(error) from None

    async def health(self) -> Response:
        """Whether answers can be asked for."""
        if not self.engine.alive:
            return JSONResponse({"status": "stopped"}, 503)
        return JSONResponse({"status": "ok", "version": __version__})

    async def version(self) -> dict[str, str]:
        """smolstack's version."""
        return {"version": __version__}

    async def show_metrics(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def _gone() -> Response:
    """What is answered to a client that went away: nobody reads it."""
    return Response(status_code=499)


async def _whole(asking: Asking, completion: Completion) -> dict[str, Any]:
    async for _ in asking:
        pass
    return completion.whole([answer for answer in asking.answers if answer is not None])


def _update_event(completion: Completion, index: int, update: Any) -> str:
    chunks = []
    if update.piece or update.logprobs:
        chunks += completion.chunks(index, update.piece, update.logprobs)
    if update.answer is not None:
        chunks += completion.last_chunks(index, update.answer)
    return "".join(map(_event, chunks))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _file(name: str, kind: str) -> Any:
    content = resources.files("smolstack.serve").joinpath("page").joinpath(name).read_bytes()

    async def send() -> Response:
        return Response(
            content,
            media_type=kind,
            headers={
                "Content-Security-Policy": _PAGE_POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            },
        )

    return send
