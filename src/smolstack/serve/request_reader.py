"""From a request's body to prompts and options: reads images from URLs and checks limits."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import unquote_to_bytes

from smolstack.errors import ContextLengthError
from smolstack.generation.options import ValidatedOptions
from smolstack.processor.processor import Prompt
from smolstack.processor.tiles import ImageSource
from smolstack.serve import functions, media, request_options
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.media import Media, MediaUrl
from smolstack.serve.pending_answers import in_thread
from smolstack.serve.remote import fetch
from smolstack.serve.schemas import (
    ChatRequest,
    ImagePart,
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
_AS_ROLE = {"developer": "system"}


async def read_media(where: str | MediaUrl, settings: ServerSettings) -> Media:
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


async def read_all(urls: Sequence[MediaUrl], settings: ServerSettings) -> list[Media]:
    """Read the bytes of a request's images, files and videos.

    Raises:
        RefusedError: there are too many, or as :func:`read_media`.
    """
    if len(urls) > settings.images:
        raise RefusedError(
            400, f"the request has {len(urls)} images, at most {settings.images} are accepted"
        )
    return [await read_media(url, settings) for url in urls]


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


def media_urls(request: ChatRequest) -> list[MediaUrl]:
    """Return the URLs of a chat's images, files and videos, in order."""
    urls: list[MediaUrl] = []
    for place, part in request.media_parts():
        if isinstance(part, ImagePart):
            urls.append(MediaUrl(part.image_url.url, f"{place}.image_url"))
        elif isinstance(part, VideoPart):
            urls.append(MediaUrl(part.video_url.url, f"{place}.video_url", "video"))
        else:
            url, name = part.file.file_data, "file"
            if not place.startswith("messages"):  # of /v1/responses, which has two fields for it
                name = "file_url" if url[:4].lower() == "http" else "file_data"
            urls.append(MediaUrl(url, f"{place}.{name}", "file"))
    return urls


def release_media(request: ChatRequest) -> None:
    """Clear the URLs of a request's images, files and videos: data URLs are another copy of the
    bytes."""
    for _, part in request.media_parts():
        if isinstance(part, ImagePart):
            part.image_url.url = ""
        elif isinstance(part, VideoPart):
            part.video_url.url = ""
        else:
            part.file.file_data = ""


def chat_prompts(
    vlm: VLM, request: ChatRequest, images: list[Media], settings: ServerSettings
) -> tuple[list[Prompt], list[ValidatedOptions]]:
    """Return the prompt and the options of each of a chat's ``n`` answers. Slow; call it in a
    thread.

    Raises:
        RefusedError, SmolstackError: the request is invalid.
    """
    functions.check_results(request.messages)
    options = request_options.answer_options(vlm, request, settings)
    characters = sum(len(text) for _, text in request.texts()) + functions.characters(request)
    check_length(vlm, "the messages and tools have", characters, settings)
    made = list(media.parts(images, vlm, settings))
    rest = iter(made)
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
        prompt = functions.prompt_with_tools(
            vlm.processor, request, messages, options[0].image_options
        )
    else:
        prompt = vlm.processor.prepare(messages, **options[0].image_options)
    check_tokens(prompt, settings)
    prompt = replace(prompt, image_names=media.image_names(images, made))
    return [prompt] * len(options), options


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
    for place, text in request.texts():
        if mark in text:
            raise RefusedError(
                400,
                f"{place} contains {mark}, the placeholder of images; send images as image parts",
                param=place,
            )
