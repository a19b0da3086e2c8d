"""Pages of TIFF files, and code shared by PDF and TIFF: ``scan.tif#page=2``."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from smolstack.errors import ImageError
from smolstack.processor import pdf
from smolstack.processor.pdf import PdfPage
from smolstack.processor.pdf_process import IsolatedPdfPage

TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = (pdf.SUFFIX, *TIFF_SUFFIXES)  # of files that may have several pages
_PAGE = re.compile(r"(.+)#page=([0-9]{1,6})", re.IGNORECASE | re.DOTALL)
_SUBFILE, _REDUCED_OR_MASK = 254, 1 | 4  # a smaller copy of another image, or its mask
_MOST = 100_000  # maximum directories counted
_MOST_UNASKED = 1000  # where no page is asked for: a file of several is rejected then
_LATEST = 100  # index of the first page's frame: Pillow reads every directory before it
_ENTRIES = 16  # of a directory that are read: they are sorted, and only 253 can precede 254


@dataclass(frozen=True)
class TiffPage:
    """A page of a TIFF file (its path, or its bytes); ``number`` is 1 for the first."""

    path: Path | bytes = field(repr=False)
    number: int

    def __str__(self) -> str:
        return f"{_name(self.path)}#page={self.number}"

    def content(self) -> bytes:
        """The value that identifies the page's image in hashes."""
        file = self.path if isinstance(self.path, bytes) else self.path.read_bytes()
        return file + f"#page={self.number}".encode()


def page_of(source: object, password: str | None = None) -> PdfPage | TiffPage | None:
    """The page that a path names; None for anything else.

    Args:
        source: ``report.pdf#page=3`` or ``scan.tif#page=3``; or a PDF file of one page, or its
            bytes.
        password: of a locked PDF file.
    """
    if isinstance(source, (PdfPage, TiffPage)):
        return source
    if isinstance(source, bytes):
        return IsolatedPdfPage(source, None, password) if pdf.is_pdf(source) else None
    if not isinstance(source, (str, Path)):
        return None
    name = str(source)
    found = _PAGE.fullmatch(name)
    if found is not None and not _is_file(source):
        path = Path(found[1])
        number = int(found[2])
        is_pdf = path.suffix.lower() == pdf.SUFFIX
        return PdfPage(path, number, password) if is_pdf else TiffPage(path, number)
    if name.lower().endswith(pdf.SUFFIX):
        return PdfPage(Path(source), None, password)
    return None


def count_pages(path: Path, password: str | None = None) -> int:
    """Count the pages of a PDF or TIFF file.

    Raises:
        ImageError: it cannot be read.
    """
    if path.suffix.lower() == pdf.SUFFIX:
        return pdf.count_pages(path, password)
    try:
        with path.open("rb") as file:
            return max(1, len(tiff_frames(file)))
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from None


def frame_of_page(source: str | Path | bytes, name: str, number: int | None) -> int:
    """Index (from 0) of a page among a TIFF file's frames.

    Args:
        number: of the page, from 1; None if not given, and then the file must have one page.

    Raises:
        ImageError: naming the number of pages.
    """
    most = _MOST_UNASKED if number is None else _MOST
    if isinstance(source, bytes):
        kinds = list(_kinds(BytesIO(source), most))
    else:
        with open(source, "rb") as file:
            kinds = list(_kinds(file, most))
    frames = _pages(kinds)
    if number is None and len(frames) > 1:
        how = (
            "each as a file of its own"
            if isinstance(source, bytes)
            else f"one of them, as in {name}#page=1"
        )
        more = " or more" if len(kinds) == most else ""
        raise ImageError(f"{name} has {len(frames)}{more} pages, expected {how}")
    if number is None:
        first = frames[0] if frames else 0
        if first > _LATEST or (not frames and len(kinds) == most):
            raise ImageError(
                f"{name} has {first or most} reduced images before its page, expected at "
                f"most {_LATEST}"
            )
        return first
    if not 1 <= number <= len(frames):
        raise ImageError(
            f"{name} has {len(frames)} pages, found page {number}, expected 1 to {len(frames)}"
        )
    return frames[number - 1]


def several_pages(file: BinaryIO) -> str | None:
    """The number of pages of a TIFF file, in words, if there are several; None otherwise. Only the
    first frames are looked at, which bounds the time that a hostile file takes."""
    kinds = list(_kinds(file, _MOST_UNASKED))
    count = len(_pages(kinds))
    if count <= 1:
        return None
    return f"{count} or more" if len(kinds) == _MOST_UNASKED else str(count)


def tiff_frames(file: BinaryIO) -> list[int]:
    """Indices of the frames of a TIFF file that are pages.

    Reduced copies of a page (thumbnails, pyramid levels) and masks are not pages. A file that is
    not TIFF has no frames; in a damaged one, frames before the damage are counted.
    """
    return _pages(_kinds(file, _MOST))


def _pages(kinds: Iterable[int]) -> list[int]:
    return [index for index, kind in enumerate(kinds) if not kind & _REDUCED_OR_MASK]


def _kinds(file: BinaryIO, most: int) -> Iterator[int]:
    """The kind of each frame of a TIFF file, the value of NewSubfileType; ``most`` at most."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return
    version = struct.unpack(order + "H", head[2:4])[0]
    if version == 42:
        shape = _Shape(order + "H", order + "HHII", order + "I")
        (place,) = struct.unpack(order + "I", head[4:8])
    elif version == 43 and len(head) == 16:
        shape = _Shape(order + "Q", order + "HHQQ", order + "Q")
        (place,) = struct.unpack(order + "Q", head[8:16])
    else:
        return
    seen: set[int] = set()
    while place and place not in seen and len(seen) < most:
        seen.add(place)
        directory = _directory(file.seek, file.read, place, shape)
        if directory is None:
            return
        kind, place = directory
        yield kind


@dataclass(frozen=True)
class _Shape:
    """Layout of a directory: its count, an entry, the offset of the next directory."""

    count: str
    entry: str
    place: str


def _directory(
    seek: Callable[[int], int], read: Callable[[int], bytes], place: int, shape: _Shape
) -> tuple[int, int] | None:
    """(kind of image, offset of the next directory) of a directory; None if truncated."""
    try:
        seek(place)
        (count,) = struct.unpack(shape.count, read(struct.calcsize(shape.count)))
        size = struct.calcsize(shape.entry)
        if count > 65535:
            return None
        entries = read(min(count, _ENTRIES) * size)
        if count > _ENTRIES:
            seek(place + struct.calcsize(shape.count) + count * size)
        (following,) = struct.unpack(shape.place, read(struct.calcsize(shape.place)))
    except (struct.error, OverflowError, ValueError, OSError):
        return None
    kind = 0
    for start in range(0, min(count, _ENTRIES) * size, size):
        tag, form = struct.unpack_from(shape.entry[0] + "HH", entries, start)
        if tag == _SUBFILE:
            value = start + size - struct.calcsize(shape.place)
            kind = struct.unpack_from(shape.entry[0] + ("H" if form == 3 else "I"), entries, value)[
                0
            ]
            break
        if tag > _SUBFILE:
            break
    return kind, following


def _name(path: Path | bytes) -> str:
    return f"image of {len(path)} bytes" if isinstance(path, bytes) else str(path)


def _is_file(source: str | Path) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # too long for a name, or a null byte in it
        return False
