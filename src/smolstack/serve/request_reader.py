"""From a request's body to prompts and options: reads images from URLs and checks limits."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from smolstack.errors import ContextLengthError
from smolstack.generation.grammar import closed
from smolstack.generation.options import (
    DEFAULT_MAX_NEW_TOKENS,
    AnswerOptions,
    ReadOptions,
    read_options,
)
from smolstack.generation.token_rules import NAMES as RULES
from smolstack.processor.geometry import Tiling
from smolstack.processor.processor import Prompt
from smolstack.processor.tiles import ImageSource
from smolstack.serve import functions, media
from smolstack.serve.admission import form_bytes
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.media import Media, MediaUrl
from smolstack.serve.pending_answers import in_thread
from smolstack.serve.remote import fetch
from smolstack.serve.schemas import (
    ChatRequest,
    FilePart,
    ImagePart,
    PlanRequest,
    ResponseFormat,
    TextPart,
    VideoPart,
)
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM

_DATA = re.compile(
    r"\s*data:\s*[\w.+-]*/?[\w.+-]*((?:\s*;\s*[\w=.+-]+)*)\s*,", re.ASCII | re.IGNORECASE
)
_BLANKS = b" \t\r\n\f\v"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
# Keywords that combine schemas: if one of them forbade additional properties, it would forbid the
# others' properties.
_SUMS = ("allOf", "if", "then", "else", "dependentSchemas", "unevaluatedProperties")
_AS_ROLE = {"developer": "system"}


async def read_image(where: str | MediaUrl, settings: ServerSettings) -> Media:
    """Read the bytes of an image, a file or a video from its URL.

    Raises:
        RefusedError: the URL is invalid, or downloading is not allowed or fails.
    """
    where = MediaUrl(where, "image_url") if isinstance(where, str) else where
    url, page = media.split_page(where.url)
    try:
        content = await _content(url, settings)
    except RefusedError as error:
        error.message = f"{where.place}: {error.message}"
        error.param = where.place
        raise
    return Media(content, where.place, where.kind, page)


async def _content(url: str, settings: ServerSettings) -> bytes:
    if url[:64].lstrip()[:5].lower() == "data:":
        return await in_thread(None, _from_data_url, url)
    url = url.strip()
    if not url[:8].lower().startswith(("http://", "https://")):
        raise RefusedError(400, "the URL is neither a data URL nor an http or https address")
    if not settings.allow_remote_images:
        raise RefusedError(
            400,
            "this server does not download images; send data URLs, or start the server with "
            "--allow-remote-images",
        )
    return await fetch(url, max_bytes=settings.remote_bytes, seconds=settings.remote_seconds)


def _from_data_url(url: str) -> bytes:
    head = _DATA.match(url[:200])
    if head is None or "base64" not in (head[1] or "").lower():
        raise RefusedError(400, "not a data URL of the form data:image/…;base64,…")
    try:
        content = url[head.end() :].encode("ascii")
        if b"%" in content:
            content = unquote_to_bytes(content)
        # As in browsers, white space is ignored and padding is optional.
        content = content.translate(_URL_SAFE, _BLANKS).rstrip(b"=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(400, "the data URL does not contain valid base64") from None


def image_urls(request: ChatRequest, settings: ServerSettings) -> list[MediaUrl]:
    """Return the URLs of a chat's images, files and videos, in order; check their number."""
    urls = []
    for place, part in _media(request):
        if isinstance(part, ImagePart):
            urls.append(MediaUrl(part.image_url.url, f"{place}.image_url"))
        elif isinstance(part, VideoPart):
            urls.append(MediaUrl(part.video_url.url, f"{place}.video_url", "video"))
        else:
            url, name = part.file.file_data, "file"
            if not place.startswith("messages"):  # of /v1/responses, which has two fields for it
                name = "file_url" if url[:4].lower() == "http" else "file_data"
            urls.append(MediaUrl(url, f"{place}.{name}", "file"))
    if len(urls) > settings.images:
        raise RefusedError(
            400, f"the request has {len(urls)} images, at most {settings.images} are accepted"
        )
    return urls


def release_images(request: ChatRequest) -> None:
    """Clear a request's image URLs, which contain another copy of the images' bytes."""
    for _, part in _media(request):
        if isinstance(part, ImagePart):
            part.image_url.url = ""
        elif isinstance(part, VideoPart):
            part.video_url.url = ""
        else:
            part.file.file_data = ""


def _media(request: ChatRequest) -> list[tuple[str, ImagePart | VideoPart | FilePart]]:
    """Return the parts other than text, and their paths in the body."""
    return [
        (f"{message.place(number)}.{index}", part)
        for number, message in enumerate(request.messages)
        if not isinstance(message.content, str)
        for index, part in enumerate(message.content)
        if not isinstance(part, TextPart)
    ]


def prepare(
    vlm: VLM, request: ChatRequest, images: list[Media], settings: ServerSettings
) -> tuple[list[Prompt], list[ReadOptions]]:
    """Return the prompt and the options of each of a chat's ``n`` answers. Slow; call it in a
    thread.

    Raises:
        RefusedError, SmolstackError: the request is invalid.
    """
    functions.check_results(request.messages)
    options = answer_options(vlm, request, settings)
    characters = sum(
        len(part if isinstance(part, str) else getattr(part, "text", ""))
        for message in request.messages
        for part in ([message.content] if isinstance(message.content, str) else message.content)
    )
    characters += functions.characters(request)
    check_length(vlm, "the messages and tools have", characters, settings)
    rest = media.parts(images, vlm, settings)
    messages = [
        {
            "role": _AS_ROLE.get(message.role, message.role),
            "content": message.content
            if isinstance(message.content, str)
            else [
                shown
                for part in message.content
                for shown in (
                    [{"type": "text", "text": part.text}]
                    if isinstance(part, TextPart)
                    else next(rest)
                )
            ],
        }
        for message in request.messages
    ]
    if settings.special_tokens_in_text:
        _check_markers(vlm, request)
    if functions.uses_tools(request):
        prompt = functions.prepare(vlm.processor, request, messages, options[0].tiling)
    else:
        prompt = vlm.processor.prepare(messages, **options[0].tiling)
    check_tokens(prompt, settings)
    return [prompt] * len(options), options


def answer_options(
    vlm: VLM, request: ChatRequest, settings: ServerSettings, prompts: int = 1
) -> list[ReadOptions]:
    """Return the options of each of the ``n`` answers to one of ``prompts`` prompts.

    Raises:
        RefusedError, SmolstackError: an option is invalid.
    """
    _check_supported(request)
    if (size := form_bytes(request)) > settings.form_bytes:
        raise RefusedError(
            400,
            f"the schema, grammar, expression and choices have {size:,} characters, at most "
            f"{settings.form_bytes:,} are accepted",
        )
    count = request.n or 1
    if count * prompts > settings.answers:
        of = "" if prompts == 1 else f" and there are {prompts} prompts"
        raise RefusedError(
            400, f"n is {count}{of}, at most {settings.answers} answers are allowed", param="n"
        )
    return [read_options(_options(request, settings, i), vlm.eos_token_ids) for i in range(count)]


def check_tokens(prompt: Prompt, settings: ServerSettings) -> None:
    """Raise ContextLengthError if a prompt exceeds the server's limit."""
    limit = settings.prompt_tokens
    if limit is not None and len(prompt.token_ids) > limit:
        raise ContextLengthError(
            f"the prompt has {len(prompt.token_ids)} tokens, at most {limit} are accepted"
        )


def check_image(image: Media, settings: ServerSettings) -> ImageSource:
    """Return an image or a page. It is refused, without decoding it, if it has too many pixels,
    needs too much memory, or has a format whose decoder is not safe for untrusted files."""
    return media.images(image, settings)[0]


def tiling(request: ChatRequest | PlanRequest) -> Tiling:
    """Return a request's tiling options; "detail": "low" for all images: one tile each."""
    split = request.split
    if split is None and isinstance(request, ChatRequest):
        details = {
            part.image_url.detail if isinstance(part, ImagePart) else "auto"
            for _, part in _media(request)
            if not isinstance(part, VideoPart)  # frames are always one tile each
        }
        split = False if details == {"low"} else None
    elif split is None and request.image_url is not None:  # type: ignore[union-attr]
        split = False if request.image_url.detail == "low" else None  # type: ignore[union-attr]
    return {
        "split": split,
        "max_image_tokens": request.max_image_tokens,
        "upscale": request.upscale,
    }


def _options(request: ChatRequest, settings: ServerSettings, answer: int) -> AnswerOptions:
    asked = request.max_completion_tokens or request.max_tokens or DEFAULT_MAX_NEW_TOKENS
    schema = (
        _schema(request.response_format)
        if request.json_schema is None
        else _closed_where_it_can(request.json_schema)
    )
    calls = functions.answer_grammar(request, schema, _closed_function)
    chosen: dict[str, Any] = {
        "max_new_tokens": min(asked, settings.new_tokens),
        "stop": request.stop or [],
        "stop_on_repetition": request.stop_on_repetition,
        "keep_special_tokens": request.keep_special_tokens,
        "regex": request.regex,
        "choices": request.choices,
        "grammar": request.grammar if calls is None else calls,
        "schema": None if calls is not None else schema,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        **tiling(request),
    }
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", *RULES):
        if getattr(request, name) is not None:
            chosen[name] = getattr(request, name)
    if request.seed is not None:
        # Each answer samples differently, but reproducibly.
        chosen["seed"] = (request.seed + answer) % 2**63
    return chosen  # type: ignore[return-value]


def _schema(wanted: ResponseFormat | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _closed_where_it_can(wanted.schema_) if wanted.schema_ else {"type": "object"}
    if wanted.json_schema is None and wanted.schema_ is not None:
        return _closed_where_it_can(wanted.schema_)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise RefusedError(
            400, "response_format json_schema has no json_schema.schema", param="response_format"
        )
    schema = wanted.json_schema.schema_
    return closed(schema) if wanted.json_schema.strict else _closed_where_it_can(schema)


def _closed_where_it_can(schema: Any) -> Mapping[str, Any]:
    """Forbid additional properties of objects with named properties, unless the schema allows them:
    small models add properties endlessly. Schemas that combine others are returned unchanged."""
    try:
        found: Mapping[str, Any] = schema if _is_sum(schema) else closed(schema)
        return found
    except RecursionError:
        raise RefusedError(400, "the schema is nested too deeply") from None


def _closed_function(schema: Mapping[str, Any], strict: bool | None) -> Mapping[str, Any]:
    found: Mapping[str, Any] = closed(schema) if strict else _closed_where_it_can(schema)
    return found


def _is_sum(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(_is_sum(item) for item in schema)
    if not isinstance(schema, Mapping):
        return False
    if any(word in schema for word in _SUMS):
        return True
    if "properties" in schema and any(word in schema for word in ("anyOf", "oneOf", "$ref")):
        return True
    return any(_is_sum(value) for value in schema.values())


def _check_supported(request: ChatRequest) -> None:
    """Refuse options that have no effect without another one."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RefusedError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    form = request.response_format
    if request.json_schema is not None and form is not None and form.type != "text":
        raise RefusedError(
            400, f"found json_schema and response_format {form.type}, expected only one",
            param="json_schema",
        )  # fmt: skip


def check_length(vlm: VLM, what: str, characters: int, settings: ServerSettings) -> None:
    """Refuse a text that certainly exceeds the limit before tokenizing it, which would be slow."""
    tokenizer, limit = vlm.processor.tokenizer, vlm.config.text.max_positions
    limit = min(limit, settings.prompt_tokens or limit)
    if characters > limit * tokenizer.longest:
        raise ContextLengthError(
            f"{what} {characters:,} characters, at most {limit:,} tokens are accepted"
        )


def _check_markers(vlm: VLM, request: ChatRequest) -> None:
    """Refuse texts that contain the image placeholder, since no image would belong to it."""
    mark = vlm.processor.markers.image
    for number, message in enumerate(request.messages):
        place, content = message.place(number), message.content
        texts = (
            [(place, content)]
            if isinstance(content, str)
            else [(f"{place}.{i}", getattr(part, "text", "")) for i, part in enumerate(content)]
        )
        for where, text in texts:
            if mark in text:
                raise RefusedError(
                    400,
                    f"{where} contains {mark}, the placeholder of images; send images as image "
                    "parts",
                    param=where,
                )
