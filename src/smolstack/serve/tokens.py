"""Routes that tokenize texts and chats, and decode token ids, without running the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from smolstack.serve import request_reader
from smolstack.serve.admission import in_pool, reading_seconds, tokenizing_seconds
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.media import Media
from smolstack.serve.pending_answers import in_thread
from smolstack.serve.request_fields import normalize_fields, without_nulls
from smolstack.serve.request_handler import CLIENT_CLOSED_REQUEST, RequestHandler
from smolstack.serve.schemas import Body, ChatMessage, ChatRequest, Text
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM


class TokenizeRequest(Body):
    """A text (``prompt`` or, as in llama.cpp, ``content``) or a chat (``messages``) to tokenize."""

    model: str = ""
    prompt: Text | None = None
    content: Text | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=1000)
    add_special_tokens: bool | None = None
    add_special: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, data: Any) -> Any:
        return normalize_fields(data) if isinstance(data, dict) and "messages" in data else (
            without_nulls(data)
        )  # fmt: skip

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        for names in (("prompt", "content", "messages"), ("add_special_tokens", "add_special")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise RefusedError(
                    400, f"found {' and '.join(given)}, expected only one of them", param=given[1]
                )
        if self.messages is not None and True in (self.add_special_tokens, self.add_special):
            raise RefusedError(
                400,
                "found add_special_tokens with messages, whose special tokens the chat template "
                "writes; leave it out",
                param="add_special_tokens",
            )
        return self


class DetokenizeRequest(Body):
    """Token ids to decode."""

    model: str = ""
    tokens: list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]] = Field(max_length=1_000_000)


def add_routes(
    app: FastAPI,
    vlm: VLM,
    settings: ServerSettings,
    handler: RequestHandler,
    errors: Mapping[str, Any],
) -> None:
    """Add ``/tokenize`` and ``/detokenize``, compatible with vLLM and llama.cpp."""

    executor = handler.readers

    def chat(body: TokenizeRequest, images: list[Media]) -> list[int]:
        request = ChatRequest.model_construct(messages=body.messages)
        (prompt,), _ = request_reader.chat_prompts(vlm, request, images, settings)
        return [int(token) for token in prompt.token_ids]

    def text(body: TokenizeRequest) -> list[int]:
        words = body.prompt if body.prompt is not None else body.content
        if words is None:
            raise RefusedError(400, "expected one of prompt, content and messages")
        special = body.add_special if body.add_special_tokens is None else body.add_special_tokens
        # vLLM's default is to add them, llama.cpp's is not to.
        special = body.prompt is not None if special is None else special
        return vlm.processor.tokenizer.encode(words, special=special)

    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Tokenize a text, or a chat's whole prompt including image tokens."""

        async def read(_: float) -> list[int]:
            if body.messages is None:
                seconds = tokenizing_seconds(len(body.prompt or body.content or ""))
                return await in_pool(executor, seconds, text, body)
            asked = ChatRequest.model_construct(messages=body.messages)
            urls = request_reader.media_urls(asked)
            images = await request_reader.read_all(urls, settings)
            urls.clear()
            request_reader.release_media(asked)
            return await in_pool(executor, reading_seconds(asked), chat, body, images)

        found = await handler.read(request, read)
        if found is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        limit = vlm.config.text.max_positions
        # A JSONResponse, since FastAPI would convert each token individually, which is slow.
        return JSONResponse({"count": len(found), "max_model_len": limit, "tokens": found})

    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Decode tokens, including special ones; returned under vLLM's and llama.cpp's names."""
        size = vlm.processor.tokenizer.size
        if wrong := [token for token in body.tokens if token >= size]:
            raise RefusedError(
                400,
                f"token id {wrong[0]} is not in the vocabulary of {size} tokens",
                param="tokens",
            )
        decode = vlm.processor.tokenizer.decode
        found = await in_thread(executor, partial(decode, body.tokens, skip_special=False))
        return {"prompt": found, "content": found}

    for path, route in (("/tokenize", tokenize), ("/detokenize", detokenize)):
        app.post(path, response_model=None, **errors)(route)
