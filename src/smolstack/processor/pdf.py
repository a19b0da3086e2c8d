"""Pages of PDF files as images: ``report.pdf#page=3`` is the third page of report.pdf.

PDFium (package pypdfium2) renders pages at DPI, twice PDF's unit resolution, as docling does for
the document models of this family. Form fields are drawn. PDFium is not thread-safe, so only one
page is rendered at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from smolstack.errors import ImageError

SUFFIX = ".pdf"
DPI = 144
MAX_PIXELS = 40_000_000  # of a page; larger ones are rendered at a lower resolution
_PAGE_BYTES = 12  # bytes per pixel of a page while it is rendered and cut
_INSIDE_BYTES = 8  # bytes per pixel of an image on a page while it is drawn
_SCALE = DPI / 72  # PDF units are 1/72 inch
_RENDERING = 2  # increment when the rendering of a page changes
_LOCKED = 4  # PDFium's error code
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF file.

    Attributes:
        path: of the file, or its bytes.
        number: from 1; None if not given, and then the file must have one page.
        password: opens a locked file.
        max_pixels: of the image; a larger page is rendered at a lower resolution.
        served: whether a client of the server sent the file, for the advice in errors.
    """

    path: Path | bytes = field(repr=False)
    number: int | None
    password: str | None = field(default=None, repr=False)
    max_pixels: int = MAX_PIXELS
    served: bool = False

    def __str__(self) -> str:
        name = _name(self.path)
        return name if self.number is None else f"{name}#page={self.number}"

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, without rendering.

        Raises:
            ImageError: as :meth:`render`.
        """
        return self.measure()[0]

    def measure(self) -> tuple[tuple[int, int], int]:
        """(width, height) in pixels, and the bytes that rendering takes, without rendering.

        Images on the page are counted by the size that they state: PDFium decodes them whole.

        Raises:
            ImageError: as :meth:`render`.
        """
        with self._opened() as page:
            from pypdfium2 import raw

            width, height = page.get_size()
            images = page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE])
            inside = max((math.prod(image.get_px_size()) for image in images), default=0)
        scale = _scale(width, height, self.max_pixels)
        size = math.ceil(width * scale), math.ceil(height * scale)
        return size, size[0] * size[1] * _PAGE_BYTES + inside * _INSIDE_BYTES

    def render(self) -> Image.Image:
        """Render the page as an RGB image, including form fields.

        Raises:
            ImageError: pypdfium2 is not installed; the file is not a PDF, is locked or damaged; the
                page does not exist, or the file has several and none was named.
        """
        with self._opened() as page:
            width, height = page.get_size()
            image: Image.Image = page.render(scale=_scale(width, height, self.max_pixels)).to_pil()
            return image.convert("RGB")

    def content(self) -> bytes:
        """The value that identifies the page's image in hashes."""
        file = self.path if isinstance(self.path, bytes) else self.path.read_bytes()
        smaller = "" if self.max_pixels == MAX_PIXELS else f" of {self.max_pixels} pixels"
        return file + f"#page={self.number}, rendering {_RENDERING}{smaller}".encode()

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with _document(self.path, self.password, self.served) as document:
            count = len(document)
            if self.number is None and count != 1:
                how = f"one of them, as in {self}#page=1"
                if isinstance(self.path, bytes):
                    how = "one of them: add #page=1" if self.served else "each as a file of its own"
                raise ImageError(f"{self} has {count} pages, expected {how}")
            number = 1 if self.number is None else self.number
            if not 1 <= number <= count:
                raise ImageError(
                    f"{_name(self.path)} has {count} pages, found page {self.number}, expected "
                    f"1 to {count}"
                )
            with _refused(self.path, self.password, self.served):
                yield document[number - 1]


def count_pages(path: Path | bytes, password: str | None = None, *, served: bool = False) -> int:
    """Count the pages of a PDF file. See PdfPage for ``served``.

    Raises:
        ImageError: it cannot be read.
    """
    with _document(path, password, served) as document:
        return len(document)


def is_pdf(content: bytes) -> bool:
    """Whether a file's bytes begin as a PDF file does."""
    return content[:1024].lstrip().startswith(b"%PDF-")


def _name(path: Path | bytes) -> str:
    return f"PDF file of {len(path)} bytes" if isinstance(path, bytes) else str(path)


def _scale(width: float, height: float, most: int) -> float:
    """Pixels per 1/72 inch: at DPI, or less to stay within ``most`` pixels."""
    pixels = width * height * _SCALE**2
    return _SCALE if pixels <= most else _SCALE * math.sqrt(most / pixels)


@contextmanager
def _document(path: Path | bytes, password: str | None, served: bool) -> Iterator[Any]:
    name = _name(path)
    try:
        import pypdfium2
    except ImportError:
        raise ImageError(
            f"{name}: PDF files need the package pypdfium2 (pip install 'smolstack[pdf]')"
        ) from None
    if isinstance(path, Path) and not path.is_file():
        there = "a pipe or device" if path.exists() else "no file"
        found = "a folder" if path.is_dir() else there
        raise ImageError(f"{path}: found {found}, expected a PDF file")
    with _ONE_AT_A_TIME:
        try:
            with _refused(path, password, served):
                document = pypdfium2.PdfDocument(path, password=password)
        except ImageError:
            if _is_empty(path, password):
                raise ImageError(f"{name} has no pages, expected at least one") from None
            raise
        try:
            with _refused(path, password, served):
                # Must be called before any page is loaded: otherwise PDFium draws no form fields.
                document.init_forms()
            yield document
        finally:
            document.close()


@contextmanager
def _refused(path: Path | bytes, password: str | None, served: bool) -> Iterator[None]:
    import pypdfium2

    name = _name(path)
    reason = ""
    try:
        yield
    except pypdfium2.PdfiumError as error:
        code = getattr(error, "err_code", None)
        reason = f"{name} cannot be read as a PDF file: {error}"
        if code == _LOCKED:
            if password is not None:
                reason = f"{name} is locked, and the password that was given does not open it"
            elif served:  # a request has no password
                reason = f"{name} is locked; save it without a password first"
            else:
                reason = (
                    f"{name} is locked; give its password (--password, password=), or save it "
                    "without one first"
                )
    if reason:
        raise ImageError(reason)


def _is_empty(path: Path | bytes, password: str | None) -> bool:
    """Whether a rejected file opens but has no pages.

    PDFium reports that case with whatever error code was set before.
    """
    from pypdfium2 import raw

    key = None if password is None else password.encode() + b"\0"
    if isinstance(path, bytes):
        document = raw.FPDF_LoadMemDocument64(path, len(path), key)
    else:
        name = str(path).encode("utf-8", "surrogateescape")
        document = raw.FPDF_LoadDocument(name + b"\0", key)
    if not document:
        return False
    raw.FPDF_CloseDocument(document)
    return True
