"""OpenAI's embeddings route: vectors of pages and queries from retrieval models."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from smolstack.errors import DeadlineError
from smolstack.generation.engine import Engine
from smolstack.generation.pools import RankedPool
from smolstack.generation.request import Request as EngineRequest
from smolstack.generation.request import Update
from smolstack.processor.processor import Prompt
from smolstack.retrieval import check_head, page_prompts, query_prompts
from smolstack.serve import request_reader
from smolstack.serve.admission import client_of, in_pool, tokenizing_seconds
from smolstack.serve.error_responses import RefusedError, as_refusal
from smolstack.serve.media import Media
from smolstack.serve.pending_answers import unless_disconnected
from smolstack.serve.request_fields import without_nulls
from smolstack.serve.schemas import Body, ImagePart
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM

_Query = Annotated[str, Field(min_length=1, max_length=100_000)]


class EmbeddingsRequest(Body):
    """Queries (texts) and pages (``{"type": "image_url", …}``) to embed."""

    model: str = ""
    input: _Query | Annotated[list[_Query | ImagePart], Field(min_length=1, max_length=64)]
    # OpenAI's client requests base64 by default, but accepts lists as well.
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, data: Any) -> Any:
        found = without_nulls(data)
        if isinstance(found, dict) and isinstance(found.get("input"), list):
            found["input"] = [_item(item) for item in found["input"]]
        return found


def _item(item: Any) -> Any:
    if isinstance(item, dict) and isinstance(item.get("image_url"), str):
        item["image_url"] = {"url": item["image_url"]}
    return item


def add_route(
    app: FastAPI,
    vlm: VLM,
    settings: ServerSettings,
    engine: Engine,
    readers: RankedPool,
    *,
    errors: Mapping[str, Any],
) -> None:
    """Add ``/v1/embeddings``."""

    def make_prompts(body: EmbeddingsRequest, images: list[Media]) -> list[Prompt]:
        check_head(vlm.model, settings.name)
        templates, rest = vlm.retrieval_prompts, iter(images)
        asked = [body.input] if isinstance(body.input, str) else body.input
        prompts: list[Prompt] = []
        for item in asked:
            if isinstance(item, str):
                prompts += query_prompts(vlm.processor, [item], templates.query)
                continue
            image = request_reader.check_image(next(rest), settings)
            split = False if item.image_url.detail == "low" else None
            prompts += page_prompts(vlm.processor, [image], templates.page, {"split": split})
        return prompts

    async def made(body: EmbeddingsRequest, client: str) -> list[EngineRequest]:
        asked = [] if isinstance(body.input, str) else body.input
        urls = [item.image_url.url for item in asked if isinstance(item, ImagePart)]
        if len(urls) > settings.images:
            raise RefusedError(
                400, f"the request has {len(urls)} images, at most {settings.images} are accepted"
            )
        images = [await request_reader.read_media(url, settings) for url in urls]
        characters = sum(len(item) for item in asked if isinstance(item, str))
        seconds = tokenizing_seconds(characters)
        prompts = await in_pool(readers, seconds, make_prompts, body, images)
        work = [
            EngineRequest(p, "vectors", deadline=time.monotonic() + settings.deadline)
            for p in prompts
        ]
        loop, ends = asyncio.get_running_loop(), []
        for each in work:
            end: asyncio.Future[None] = loop.create_future()
            each.listener = _listener(loop, end)
            ends.append(end)
        try:
            engine.enter(work, client=client)
            await asyncio.gather(*ends)
        except BaseException:
            for each in work:
                engine.cancel(each)
            raise
        return work

    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Embed queries and pages: for each, a list of vectors, one per token."""
        try:
            work = await unless_disconnected(
                request.receive,
                asyncio.wait_for(made(body, client_of(request, settings)), settings.deadline),
            )
        except asyncio.TimeoutError:
            late = DeadlineError("the embeddings were not complete before their deadline")
            raise as_refusal(late) from None
        except Exception as error:
            raise as_refusal(error) from None
        if work is None:
            return Response(status_code=499)
        used = sum(len(each.prompt.token_ids) for each in work)
        data = [
            {"object": "embedding", "index": index, "embedding": each.vectors.tolist()}
            for index, each in enumerate(work)
        ]
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "model": body.model or settings.name,
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )

    app.post("/v1/embeddings", response_model=None, **errors)(embeddings)


def _listener(
    loop: asyncio.AbstractEventLoop, end: asyncio.Future[None]
) -> Callable[[Update], None]:
    """Return a listener that completes a future, in its event loop, when a request ends."""

    def finish(update: Update) -> None:
        if end.done():
            return
        if update.error is not None:
            end.set_exception(update.error)
        else:
            end.set_result(None)

    def listen(update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(finish, update)

    return listen
