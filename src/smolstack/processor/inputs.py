"""Input types of a sequence: a text or a chat, with images and videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from smolstack.batch import VisualTokens
from smolstack.errors import ImageError, PromptError
from smolstack.option_types import TEXT, check_option_types
from smolstack.processor import prompt as prompts
from smolstack.processor.geometry import TILING_TYPES, Tiling
from smolstack.processor.pages import TiffPage, page_of
from smolstack.processor.pdf import PdfPage
from smolstack.processor.prompt import Message
from smolstack.processor.tiles import ImageSource
from smolstack.processor.video import Frame, Video, is_video

T = TypeVar("T")
ImageInput: TypeAlias = "ImageSource | VisualTokens"
MediaInput: TypeAlias = "ImageInput | Video"  # a path may be a video's
# Input of one sequence: a text, the messages of a chat, or either with its images.
PromptLike: TypeAlias = "str | Sequence[Message] | tuple[Any, str | Sequence[Message]]"


class ImageOptions(Tiling, total=False):
    """How images are opened and tiled. See also Tiling.

    Attributes:
        password: opens locked PDF files.
    """

    password: str | None


IMAGE_OPTION_TYPES = {**TILING_TYPES, "password": TEXT}


def as_images(images: Any) -> list[Any]:
    """Normalize an image or video, or a list of them, to a list; None gives an empty list."""
    if images is None:
        return []
    single = (
        str, Path, bytes, PdfPage, TiffPage, Image.Image, np.ndarray, VisualTokens, Video,
    )  # fmt: skip
    if isinstance(images, single):
        return [images]
    if not isinstance(images, Sequence):
        raise ImageError(f"found a {type(images).__name__}, expected an image or a list of them")
    return list(images)


def with_password(image: T, password: str | None) -> T | PdfPage:
    """The same image; for a PDF file (its path or its bytes), with its password attached."""
    check_option_types({"password": password}, IMAGE_OPTION_TYPES, ImageError)
    if password is None or not isinstance(image, (str, Path, bytes)):
        return image
    page = page_of(image, password)
    return page if isinstance(page, PdfPage) else image


def as_messages(
    entry: PromptLike, read_video: Callable[[Any], Video]
) -> tuple[list[dict[str, Any]], list[ImageInput | Frame]]:
    """A sequence as messages, and the images of their image parts in order."""
    images: Any = None
    asked: Any = entry
    if isinstance(entry, tuple) and len(entry) == 2:
        images, asked = entry
    given = as_images(images)
    if isinstance(asked, str):
        if not any(map(is_video, given)):
            return [prompts.user_message(len(given), asked)], given
        kinds = ("video" if is_video(shown) else "image" for shown in given)
        parts = [{"type": kind, kind: shown} for kind, shown in zip(kinds, given, strict=True)]
        content = [*parts, {"type": "text", "text": asked}]
        return prompts.split_messages([{"role": "user", "content": content}], read_video)
    if isinstance(asked, tuple) or not isinstance(asked, Sequence):
        raise PromptError(f"a prompt {entry!r:.80}, expected (images, text) or a chat")
    messages, shown = prompts.split_messages(asked, read_video)
    empty = sum(part is None for part in shown)
    if empty != len(given):
        raise PromptError(
            f"the chat has {empty} image parts without an image (under one of "
            f"{list(prompts.IMAGE_KEYS)}) and {len(given)} images were given beside it"
        )
    rest = iter(given)
    return messages, [next(rest) if part is None else part for part in shown]
