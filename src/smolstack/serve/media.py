"""Images, pages of PDF and TIFF files, and videos in the parts of a request's messages."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal

from smolstack.errors import ContextLengthError, ImageError, SmolstackError
from smolstack.processor.formats import SERVED
from smolstack.processor.pages import TiffPage, several_pages, tiff_frames
from smolstack.processor.pdf import MAX_PIXELS, is_pdf
from smolstack.processor.pdf_process import isolated_pages
from smolstack.processor.tiles import ImageSource, image_size
from smolstack.processor.video import Video
from smolstack.processor.video_bytes import VideoBytes
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM

VIDEO_SECONDS = 30.0  # time limit for decoding a video
_PAGE = re.compile(r"#page=([0-9]{1,6})\s*$")
Kind = Literal["image", "file", "video"]


@dataclass(frozen=True)
class MediaUrl:
    """The URL of a part: a data URL or an address; ``place`` is the part's path in the body."""

    url: str = field(repr=False)
    place: str
    kind: Kind = "image"


@dataclass(frozen=True)
class Media:
    """The content of a part.

    Attributes:
        place: the part's path in the body.
        page: the page requested by ``#page=3``, counted from 1; None: not given.
    """

    content: bytes = field(repr=False)
    place: str
    kind: Kind = "image"
    page: int | None = None

    def placed(self, error: SmolstackError) -> RefusedError:
        """Return a refusal that names this part."""
        return RefusedError(400, f"{self.place}: {error}", param=self.place)


def split_page(url: str) -> tuple[str, int | None]:
    """Split ``#page=3`` off a URL, which may be a long data URL; the page is None without it."""
    found = _PAGE.search(url, max(0, len(url) - 32))
    return (url, None) if found is None else (url[: found.start()], int(found[1]))


def page_count(media: Media) -> int:
    """Return the number of pages of a PDF or TIFF file; 1 for any other image.

    Raises:
        ImageError: the file cannot be read.
    """
    if is_pdf(media.content):
        return isolated_pages(media.content, None, every=True, most=0, max_pixels=MAX_PIXELS)[0]
    return max(1, len(tiff_frames(BytesIO(media.content))))


def images(media: Media, settings: ServerSettings) -> list[ImageSource]:
    """Return the images of a part: one for an image part; all pages, or the requested one, for a
    file part. Nothing is decoded.

    Raises:
        RefusedError: an image cannot be read or exceeds the server's limits.
    """
    try:
        if media.kind == "file" and not is_pdf(media.content):
            raise ImageError(
                f"a file of {len(media.content)} bytes is not a PDF file; send images as image_url "
                "parts and videos as video_url parts"
            )
        found = _pages(media, settings)
        for image in found:
            image_size(image, settings.image_pixels, SERVED)
        return found
    except SmolstackError as error:
        refusal = media.placed(error)
    raise refusal


def video(media: Media, vlm: VLM, settings: ServerSettings) -> Video:
    """Decode the frames of a video part.

    Raises:
        RefusedError: the video cannot be read or exceeds the server's limits.
    """
    until = time.monotonic() + min(VIDEO_SECONDS, settings.deadline)
    try:
        return vlm.processor.open_video(VideoBytes(media.content, settings.image_pixels, until))
    except SmolstackError as error:
        refusal = media.placed(error)
    raise refusal


def parts(all_media: list[Media], vlm: VLM, settings: ServerSettings) -> Iterator[list[Any]]:
    """Yield the processor's message parts for each image, file or video part.

    Raises:
        RefusedError, ContextLengthError: as :func:`images` and :func:`video`; the request has too
            many images, or more frames than fit in the context.
    """
    shown = frames = 0
    limit = min(vlm.config.text.max_positions, settings.prompt_tokens or 2**62)
    for media in all_media:
        if media.kind == "video":
            made = video(media, vlm, settings)
            shown, frames = shown + 1, frames + len(made.frames)
            if frames * vlm.processor.tokens_per_tile > limit:
                raise ContextLengthError(
                    f"{media.place}: the videos have {frames} frames of "
                    f"{vlm.processor.tokens_per_tile} visual tokens, the limit is {limit}"
                )
            yield [{"type": "video", "video": made}]
        else:
            found = images(media, settings)
            shown += len(found)
            yield [{"type": "image", "image": image} for image in found]
        if shown > settings.images:
            raise RefusedError(
                400,
                f"{media.place}: the request has {shown} images, pages and videos so far, at most "
                f"{settings.images} are accepted",
                param=media.place,
            )


def image_names(all_media: list[Media], made: list[list[Any]]) -> tuple[str, ...]:
    """Return the name of each image of a prompt: the path of its part in the body.

    Args:
        made: the processor's message parts of each, from :func:`parts`.
    """
    return tuple(
        media.place
        for media, shown in zip(all_media, made, strict=True)
        for part in shown
        for _ in range(len(part["video"].frames) if part["type"] == "video" else 1)
    )


def _pages(media: Media, settings: ServerSettings) -> list[ImageSource]:
    if not is_pdf(media.content):
        content, number = media.content, media.page
        if number is None and (several := several_pages(BytesIO(content))):
            raise ImageError(f"the file has {several} pages, expected one of them: add #page=1")
        return [content if number is None else TiffPage(content, number)]
    count, pages = isolated_pages(
        media.content,
        media.page,
        every=media.kind == "file" and media.page is None,
        most=settings.images,
        max_pixels=min(MAX_PIXELS, settings.image_pixels),
    )
    if not pages:
        raise ImageError(
            f"the file has {count} pages, at most {settings.images} are accepted; select one with "
            "#page=1"
        )
    return list(pages)
