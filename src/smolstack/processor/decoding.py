"""The only module that opens files with Pillow and decodes them, large JPEG 2000 files in a process
of their own.

The memory that a decoder will allocate is estimated in advance and counted against a limit for the
whole process. A decoder may raise any exception on a damaged file: all become ImageError. It is
raised after the decoder's own exception is released, whose traceback would keep the pixels alive.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from smolstack.errors import ImageError
from smolstack.processor import jpeg2000_process, libtiff
from smolstack.processor.decoder_costs import check_icon, decoding_bytes
from smolstack.processor.decoding_memory import MEMORY
from smolstack.processor.decoding_pace import check_pace, check_scans
from smolstack.processor.formats import (
    FORMATS,
    SERVED,
    VIDEO_SUFFIXES,
    accepted,
    can_read_heif,
    is_heif,
)
from smolstack.processor.pages import TiffPage, frame_of_page
from smolstack.processor.pdf import is_pdf
from smolstack.processor.png import late_words
from smolstack.processor.rgb import ORIENTATION, to_rgb
from smolstack.processor.sources import named

T = TypeVar("T")
_log = logging.getLogger("smolstack")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_told: set[str] = set()  # animations already reported


@contextmanager
def decoded(
    source: str | Path | bytes | TiffPage, max_pixels: int, formats: tuple[str, ...] = FORMATS
) -> Iterator[Image.Image]:
    """A file's image in RGB, upright; its memory is counted while the block runs.

    Raises:
        ImageError: naming the file.
    """
    name, file = named(source)
    image = _open(name, file, source, formats)
    try:
        said = image.size
        check_size(name, said, max_pixels)
        _tell_animated(image, name)
        cost = _cost(image, file, name)
        with MEMORY.hold(cost, name):
            if jpeg2000_process.is_worth_it(image):
                pixels = _guarded(name, lambda: jpeg2000_process.decode(file, cost))
            else:
                pixels = _guarded(name, lambda: to_rgb(image, upright=True))
            image.close()
            if pixels.size not in (said, said[::-1]):
                raise ImageError(
                    f"{name} says that it has {said[0]}x{said[1]} pixels, and holds an image of "
                    f"{pixels.width}x{pixels.height}"
                )
            yield pixels
    finally:
        image.close()


def size_of(
    source: str | Path | bytes | TiffPage, max_pixels: int, formats: tuple[str, ...] = FORMATS
) -> tuple[int, int]:
    """(width, height) of a file's image, upright.

    Nothing is decoded.

    Raises:
        ImageError: naming the file.
    """
    name, file = named(source)
    image = _open(name, file, source, formats)
    try:
        check_size(name, image.size, max_pixels)
        cost = _cost(image, file, name)
        if cost > MEMORY.limit:
            with MEMORY.hold(cost, name):
                pass  # never comes here: it is refused
        return _guarded(name, lambda: _upright_size(image))
    finally:
        image.close()


def animation(
    path: Path, max_pixels: int, formats: tuple[str, ...], wanted: frozenset[int] | None
) -> Iterator[tuple[Image.Image | None, float]]:
    """Yield (RGB image, seconds shown) for each frame of an animation.

    Args:
        wanted: indices of the frames to convert; None for no frame.

    Raises:
        ImageError: naming the file.
    """
    name, file = named(path)
    image: Any = _open(name, file, path, formats)
    try:
        check_size(name, image.size, max_pixels)
        with MEMORY.hold(_cost(image, file, name), name):
            for number in range(_guarded(name, lambda: int(getattr(image, "n_frames", 1)))):
                _guarded(name, partial(image.seek, number))
                _guarded(name, image.load)
                made = None
                if wanted is not None and number in wanted:
                    made = _guarded(name, lambda: to_rgb(image))
                yield made, float(image.info.get("duration") or 0) / 1000
    finally:
        image.close()


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Reject an image with too many pixels, or none."""
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} pixels, more than the {max_pixels:,} that are decoded"
        )
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width}x{height} pixels; both sides must be positive")


def _open(
    name: str,
    file: str | Path | bytes,
    source: str | Path | bytes | TiffPage,
    formats: tuple[str, ...],
) -> Image.Image:
    """Open a file and read its header, at the requested page."""
    number = source.number if isinstance(source, TiffPage) else None
    image = _guarded(name, lambda: _read_header(file, formats), "cannot be read as an image")
    if image is None:
        raise ImageError(_no_image(name, file, formats))
    if image.format == "TIFF":
        libtiff.silence()
        try:
            frame = frame_of_page(file, name, number)
            if frame:
                _guarded(name, lambda: image.seek(frame))
        except BaseException:
            image.close()
            raise
    elif number is not None:
        image.close()
        raise ImageError(f"{name} is a {image.format} file, which has no pages; expected none")
    return image


def _read_header(file: str | Path | bytes, formats: tuple[str, ...]) -> Image.Image | None:
    tried = accepted(formats)
    check_icon(file)
    check_scans(file)
    if formats == SERVED:
        check_pace(file)
    with warnings.catch_warnings():
        # The pixel limit is checked here before decoding; Pillow's own is only a warning. Its
        # warnings about damaged tags matter only if decoding fails.
        warnings.simplefilter("ignore")
        try:
            return _opened(file, tried)
        except KeyError:  # this Pillow does not know one of them
            known = tuple(form for form in tried if form in Image.OPEN)
            if known == tried:
                raise
            return _opened(file, known)


def _opened(file: str | Path | bytes, formats: tuple[str, ...]) -> Image.Image | None:
    try:
        return Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=formats)
    except UnidentifiedImageError:
        return None


def _no_image(name: str, file: str | Path | bytes, formats: tuple[str, ...]) -> str:
    beginning = file[:1024] if isinstance(file, bytes) else _beginning(Path(file))
    if is_heif(beginning) and not can_read_heif():
        return (
            f"{name} is a HEIC or HEIF file, which needs the package pillow-heif "
            "(pip install 'smolstack[heif]'), or has to be saved as JPEG first"
        )
    if is_pdf(beginning):
        return f"{name} is a PDF file, expected an image; name it with the suffix .pdf"
    if not isinstance(file, bytes) and Path(file).suffix.lower() in VIDEO_SUFFIXES:
        return f"{name} is a video, expected an image; ask and chat read videos"
    known = ", ".join(sorted(accepted(formats)))
    return f"{name} is not an image in a supported format ({known}), or its beginning is damaged"


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024)


def _cost(image: Image.Image, file: str | Path | bytes, name: str) -> int:
    return _guarded(name, lambda: decoding_bytes(image, file))


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":
        # Some versions of Pillow report the size after rotation, others as stored.
        width, height = image.tag_v2[256], image.tag_v2[257]
        turned = image.tag_v2.get(274, 1) in (5, 6, 7, 8)
    else:
        # PNG's own getexif() decodes the file first.
        said = late_words(image.fp) if image.format == "PNG" else None
        turned = Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
        if said is not None:
            with Image.open(BytesIO(said), formats=("PNG",)) as small:
                turned = small.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _tell_animated(image: Image.Image, name: str) -> None:
    """Log once per animation that only its first frame is read."""
    if image.format not in _ANIMATED or name in _told or len(_told) > 1000:
        return
    if _guarded(name, lambda: bool(getattr(image, "is_animated", False))):
        _told.add(name)
        _log.warning("%s is an animation; its first frame is read", name)


def _guarded(name: str, act: Callable[[], T], trouble: str = "is damaged or truncated") -> T:
    """Return the result of ``act``; any exception becomes an ImageError."""
    try:
        return act()
    except ImageError as error:
        reason = f"{name}: {error}"
    except Image.DecompressionBombError as error:
        reason = f"{name} is too large to decode: {error}"
    except MemoryError:
        reason = f"{name} takes more memory to decode than there is"
    except Exception as error:
        reason = f"{name} {trouble}: {_one_line(error)}"
    # The decoder's exception is released here, with its traceback and the pixels in its frames.
    raise ImageError(reason)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or "no reason is given"
    known = isinstance(error, (OSError, ValueError, SyntaxError, EOFError))
    return text if known else f"{type(error).__name__}: {text}"
