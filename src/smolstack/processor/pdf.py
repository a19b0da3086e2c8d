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
_SCALE = DPI / 72  # PDF units are 1/72 inch
_RENDERING = 2  # increment when the rendering of a page changes
_LOCKED = 4  # PDFium's error code
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF file.

    Attributes:
        path: of the file.
        number: from 1; None if not given, and then the file must have one page.
        password: opens a locked file.
    """

    path: Path
    number: int | None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.path) if self.number is None else f"{self.path}#page={self.number}"

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, without rendering.

        Raises:
            ImageError: as :meth:`render`.
        """
        with self._opened() as page:
            width, height = page.get_size()
        scale = _scale(width, height)
        return math.ceil(width * scale), math.ceil(height * scale)

    def render(self) -> Image.Image:
        """Render the page as an RGB image, including form fields.

        Raises:
            ImageError: pypdfium2 is not installed; the file is not a PDF, is locked or damaged; the
                page does not exist, or the file has several and none was named.
        """
        with self._opened() as page:
            image: Image.Image = page.render(scale=_scale(*page.get_size())).to_pil()
            return image.convert("RGB")

    def content(self) -> bytes:
        """The value that identifies the page's image in hashes."""
        return self.path.read_bytes() + f"#page={self.number}, rendering {_RENDERING}".encode()

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with _document(self.path, self.password) as document:
            count = len(document)
            if self.number is None and count != 1:
                raise ImageError(
                    f"{self.path} has {count} pages, expected one of them, as in {self.path}#page=1"
                )
            number = 1 if self.number is None else self.number
            if not 1 <= number <= count:
                raise ImageError(f"{self.path} has {count} pages, expected no page {self.number}")
            with _refused(self.path, self.password):
                yield document[number - 1]


def count_pages(path: Path, password: str | None = None) -> int:
    """Count the pages of a PDF file.

    Raises:
        ImageError: it cannot be read.
    """
    with _document(path, password) as document:
        return len(document)


def _scale(width: float, height: float) -> float:
    """Pixels per 1/72 inch: at DPI, or less to stay within MAX_PIXELS."""
    pixels = width * height * _SCALE**2
    return _SCALE if pixels <= MAX_PIXELS else _SCALE * math.sqrt(MAX_PIXELS / pixels)


@contextmanager
def _document(path: Path, password: str | None) -> Iterator[Any]:
    try:
        import pypdfium2
    except ImportError:
        raise ImageError(
            f"{path}: PDF files need the package pypdfium2 (pip install 'smolstack[pdf]')"
        ) from None
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise ImageError(f"{path}: found {found}, expected a PDF file")
    with _ONE_AT_A_TIME:
        try:
            with _refused(path, password):
                document = pypdfium2.PdfDocument(path, password=password)
        except ImageError:
            if _is_empty(path, password):
                raise ImageError(f"{path} has no pages, expected at least one") from None
            raise
        try:
            with _refused(path, password):
                # Must be called before any page is loaded: otherwise PDFium draws no form fields.
                document.init_forms()
            yield document
        finally:
            document.close()


@contextmanager
def _refused(path: Path, password: str | None) -> Iterator[None]:
    import pypdfium2

    reason = ""
    try:
        yield
    except pypdfium2.PdfiumError as error:
        code = getattr(error, "err_code", None)
        reason = f"{path} cannot be read as a PDF file: {error}"
        if code == _LOCKED:
            reason = (
                f"{path} is locked; give its password (--password, password=), or save it without "
                "one first"
                if password is None
                else f"{path} is locked, and the password that was given does not open it"
            )
    if reason:
        raise ImageError(reason)


def _is_empty(path: Path, password: str | None) -> bool:
    """Whether a rejected file opens but has no pages.

    PDFium reports that case with whatever error code was set before.
    """
    from pypdfium2 import raw

    key = None if password is None else password.encode() + b"\0"
    document = raw.FPDF_LoadDocument(str(path).encode("utf-8", "surrogateescape") + b"\0", key)
    if not document:
        return False
    raw.FPDF_CloseDocument(document)
    return True
