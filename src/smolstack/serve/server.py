"""The server's routes: OpenAI's API, models, plans, health, metrics, and the test page."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from smolstack import __version__
from smolstack.generation.engine import Engine
from smolstack.generation.pools import RankedPool
from smolstack.processor.decoding_memory import MEMORY
from smolstack.serve import (
    embeddings,
    functions,
    plans,
    request_reader,
    text_completions,
    tokens,
    validation_errors,
)
from smolstack.serve.body_memory import BodyMemory
from smolstack.serve.chat_completions import ChatCompletionWriter
from smolstack.serve.error_responses import RefusedError, add_handlers
from smolstack.serve.media import Media, MediaUrl
from smolstack.serve.metrics import Metrics
from smolstack.serve.middleware import Guard
from smolstack.serve.parsing import JsonRoute
from smolstack.serve.pending_answers import in_thread
from smolstack.serve.request_handler import CLIENT_CLOSED_REQUEST, RequestHandler
from smolstack.serve.response_requests import ResponsesRequest
from smolstack.serve.responses import ResponseWriter
from smolstack.serve.schemas import ChatRequest, PlanRequest
from smolstack.serve.settings import ServerSettings
from smolstack.serve.tool_calls import ToolCallWriter
from smolstack.vlm import VLM

_READING_THREADS, _LONG_READING = 3, 1  # threads, and how many of them may read long requests
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request is invalid; the error states the reason.",
        401: "The API key is missing or wrong.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "Too many requests are waiting; Retry-After gives the seconds to wait.",
        503: "The server is shutting down.",
        504: "The answer took longer than its deadline.",
    }.items()
}


class Server:
    """The ASGI application that serves one model.

    Until it is closed, its settings are those of the model's processor and image cache, and its
    limit of memory for decoding is that of the process.

    Attributes:
        app: the application.
        engine: processes the requests.
    """

    def __init__(self, vlm: VLM, settings: ServerSettings) -> None:
        self.vlm, self.settings = vlm, settings
        self.engine = Engine(
            vlm.model, vlm.processor, settings.scheduler, image_cache=vlm.image_cache
        )
        self.metrics = Metrics(self.engine)
        self.readers = RankedPool(_READING_THREADS, _LONG_READING, "reading")
        self.handler = RequestHandler(vlm, settings, self.engine, self.metrics, self.readers)
        # FastAPI's own documentation pages load scripts from other sites.
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
        self.bodies = BodyMemory(settings.bodies_bytes)
        self.app.add_middleware(
            Guard, settings=settings, count=self.metrics.count_response, bodies=self.bodies
        )
        if settings.origins:
            # Outermost, so that allowed pages can also read error responses.
            self.app.add_middleware(
                CORSMiddleware,
                allow_origins=list(settings.origins),
                allow_methods=["GET", "HEAD", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            )
        self._add_routes()
        self._restoring = contextlib.ExitStack()
        self._set(MEMORY, "limit", settings.decode_bytes)
        self._set(vlm.image_cache, "max_bytes", settings.image_cache_bytes)
        self._set(vlm.processor, "special_tokens_in_text", settings.special_tokens_in_text)

    def _set(self, owner: object, name: str, value: object) -> None:
        """Set an attribute until the server is closed."""
        self._restoring.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        # All requests have ended by now.
        await in_thread(None, self.close)

    def close(self) -> None:
        """Stop the engine and restore the settings of the model and the process."""
        self.engine.close(drain=False)
        self.readers.shutdown(cancel_futures=True)
        self._restoring.close()

    def _add_routes(self) -> None:
        app = self.app
        errors = {"responses": _ERRORS}
        app.post("/v1/chat/completions", response_model=None, **errors)(self.chat)  # type: ignore[arg-type]
        text_completions.add_route(app, self.vlm, self.settings, self.handler, errors)
        app.post("/v1/responses", response_model=None, **errors)(self.responses)  # type: ignore[arg-type]
        app.get("/v1/models", responses={401: _ERRORS[401]})(self.models)
        app.get("/v1/models/{model:path}", responses={401: _ERRORS[401], 404: {}})(self.one_model)
        app.post("/plan", response_model=None, **errors)(self.plan)  # type: ignore[arg-type]
        embeddings.add_route(app, self.vlm, self.settings, self.handler, errors)
        tokens.add_routes(app, self.vlm, self.settings, self.handler, errors)
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
        """Answer a chat, with one response or with server-sent events."""

        def writer() -> ChatCompletionWriter:
            kind = ToolCallWriter if functions.offered_tools(body) else ChatCompletionWriter
            name, usage = body.model or self.settings.name, body.stream_options
            return kind(
                name,
                self.vlm.processor.tokenizer,
                with_usage=usage is not None and usage.include_usage,
            )

        return await self.handler.answer(body, request, writer)

    async def responses(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer an input of text and images, with one response or with server-sent events."""
        name, tokenizer = body.model or self.settings.name, self.vlm.processor.tokenizer
        chat = body.chat()

        def writer() -> ResponseWriter:
            return ResponseWriter(name, tokenizer, body, calls=bool(functions.offered_tools(chat)))

        return await self.handler.answer(chat, request, writer)

    async def models(self) -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, model: str) -> dict[str, Any]:
        """Describe the served model."""
        if model != self.settings.name:
            raise RefusedError(
                404, f"no model {model[:100]!r}; this server has {self.settings.name!r}"
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

    async def plan(self, body: PlanRequest, request: Request) -> Response:
        """Plan the tiles and tokens of an image, without running the model."""

        async def read(_: float) -> dict[str, Any]:
            found: Media | tuple[int, int]
            sized = body.width is not None or body.height is not None
            given = {"image_url": body.image_url, "video_url": body.video_url}
            named = [name for name, value in given.items() if value is not None]
            named += ["width and height"] if sized else []
            if len(named) > 1:
                raise RefusedError(400, f"found {' and '.join(named)}, expected only one of them")
            if body.preview and sized:
                raise RefusedError(400, "a size has no preview; leave it out", param="preview")
            if body.image_url is not None:
                found = await request_reader.read_media(body.image_url.url, self.settings)
                body.image_url.url = ""
            elif body.video_url is not None:
                where = MediaUrl(body.video_url.url, "video_url", "video")
                found = await request_reader.read_media(where, self.settings)
                body.video_url.url = ""
            elif body.width and body.height:
                found = (body.width, body.height)
            else:
                raise RefusedError(400, "expected image_url, video_url, or width and height")
            return await in_thread(
                self.readers, plans.plan_response, self.vlm, found, body, self.settings
            )

        made = await self.handler.read(request, read)
        return Response(status_code=CLIENT_CLOSED_REQUEST) if made is None else JSONResponse(made)

    async def health(self) -> Response:
        """Report whether the server accepts requests."""
        if not self.engine.alive:
            return JSONResponse({"status": "stopped"}, 503)
        return JSONResponse({"status": "ok", "version": __version__})

    async def version(self) -> dict[str, str]:
        """Return smolstack's version."""
        return {"version": __version__}

    async def show_metrics(self) -> Response:
        """Return metrics in Prometheus' format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


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
