"""OpenAI's embeddings route: vectors of pages and queries from retrieval models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from smolstack.generation.request import Request as EngineRequest
from smolstack.processor.processor import Prompt
from smolstack.retrieval import check_head, page_prompts, query_prompts
from smolstack.serve import request_reader
from smolstack.serve.admission import in_pool, tokenizing_seconds
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.media import Media, MediaUrl
from smolstack.serve.request_fields import without_nulls
from smolstack.serve.request_handler import CLIENT_CLOSED_REQUEST, RequestHandler
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

    def items(self) -> list[tuple[str, str | ImagePart]]:
        """Return the queries and pages, each with its path in the body."""
        if isinstance(self.input, str):
            return [("input", self.input)]
        return [(f"input.{index}", item) for index, item in enumerate(self.input)]

    def characters(self) -> int:
        """Return the total length of the queries."""
        return sum(len(item) for _, item in self.items() if isinstance(item, str))

    def media_urls(self) -> list[MediaUrl]:
        """Return the URLs of the pages, in order."""
        return [
            MediaUrl(item.image_url.url, f"{place}.image_url")
            for place, item in self.items()
            if isinstance(item, ImagePart)
        ]

    def release_media(self) -> None:
        """Clear the URLs of the pages: data URLs are another copy of the bytes."""
        for _, item in self.items():
            if isinstance(item, ImagePart):
                item.image_url.url = ""


def _item(item: Any) -> Any:
    if isinstance(item, dict) and isinstance(item.get("image_url"), str):
        item["image_url"] = {"url": item["image_url"]}
    return item


def add_route(
    app: FastAPI,
    vlm: VLM,
    settings: ServerSettings,
    handler: RequestHandler,
    errors: Mapping[str, Any],
) -> None:
    """Add ``/v1/embeddings``."""

    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Embed queries and pages: for each, a list of vectors, one per token."""

        async def read(deadline: float) -> list[EngineRequest]:
            check_head(vlm.model, settings.name)
            images = await request_reader.read_all(body.media_urls(), settings)
            body.release_media()
            seconds = tokenizing_seconds(body.characters())
            prompts = await in_pool(handler.readers, seconds, _prompts, vlm, body, images, settings)
            return [EngineRequest(prompt, "vectors", deadline=deadline) for prompt in prompts]

        pending = await handler.begin(request, read)
        if pending is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        name = body.model or settings.name
        return await handler.complete(request, pending, lambda: _whole(pending.requests, name))

    app.post("/v1/embeddings", response_model=None, **errors)(embeddings)


def _prompts(
    vlm: VLM, body: EmbeddingsRequest, images: list[Media], settings: ServerSettings
) -> list[Prompt]:
    """Return the prompt of each query and page. Slow; call it in a thread.

    Raises:
        RefusedError, SmolstackError: a query or a page is invalid.
    """
    templates, rest = vlm.retrieval_prompts, iter(images)
    prompts: list[Prompt] = []
    for place, item in body.items():
        if isinstance(item, str):
            if not item.strip():
                raise RefusedError(
                    400, f"{place} is {item!r:.80}, expected non-empty text", param=place
                )
            request_reader.check_length(vlm, f"{place} has", len(item), settings)
            prompts += query_prompts(vlm.processor, [item], templates.query)
        else:
            media = next(rest)
            image = request_reader.check_image(media, settings)
            split = False if item.image_url.detail == "low" else None
            (made,) = page_prompts(vlm.processor, [image], templates.page, {"split": split})
            prompts.append(replace(made, image_names=(media.place,)))
        request_reader.check_tokens(prompts[-1], settings)
    return prompts


def _whole(requests: Sequence[EngineRequest], name: str) -> dict[str, Any]:
    """Return the body of the response."""
    used = sum(len(each.prompt.token_ids) for each in requests)
    data = []
    for index, each in enumerate(requests):
        assert each.vectors is not None, "the request has not finished"
        data.append({"object": "embedding", "index": index, "embedding": each.vectors.tolist()})
    return {
        "object": "list",
        "data": data,
        "model": name,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }
