"""Content hashes of images, for caches."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from smolstack.errors import ImageError
from smolstack.processor.pages import TiffPage, page_of
from smolstack.processor.pdf import PdfPage
from smolstack.processor.tiles import ImageSource


def content_digest(source: ImageSource) -> bytes:
    """Hash an image's file (and page), or its pixels if there is no file.

    Raises:
        ImageError: an opened Pillow image that cannot be decoded.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(b"file" + source).digest()
    if isinstance(source, (str, Path, PdfPage, TiffPage)):
        page = page_of(source)
        if page is not None:
            return hashlib.sha256(b"file" + page.content()).digest()
        assert isinstance(source, (str, Path))
        return hashlib.sha256(b"file" + Path(source).read_bytes()).digest()
    if isinstance(source, Image.Image):
        # The palette and transparent color are not part of the pixels.
        pixels = _pixels(source)
        beside = (
            source.mode, source.size, source.getpalette(), source.info.get("transparency"),
        )  # fmt: skip
        return hashlib.sha256(repr(beside).encode() + pixels).digest()
    return hashlib.sha256(repr(("array", source.shape)).encode() + source.tobytes()).digest()


def _pixels(image: Image.Image) -> bytes:
    try:
        return image.tobytes()
    except Exception as error:  # an opened file's decoder may raise anything
        reason = f"the image is damaged or truncated: {error}"
    raise ImageError(reason)
