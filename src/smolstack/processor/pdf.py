"""Pages of PDF files as images: ``report.pdf#page=3`` is the third page of report.pdf.

Pages are rendered by PDFium (package pypdfium2) at DPI, twice the size that PDF counts in, as
docling does for the document models of this family; the fields of forms are drawn. PDFium works on
one page at a time, whatever threads ask.
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
MAX_PIXELS = 40_000_000  # of a page; one that would have more is rendered smaller
_SCALE = DPI / 72  # PDF counts in 72nds of an inch
_RENDERING = 2  # counts up when the same page is rendered to another image
_LOCKED = 4  # PDFium's code
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF file.

    Attributes:
        path: of the file.
        number: 1 for the first, None where none was named and the file must have one.
        password: that opens the file, where it is locked.
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
        """The page as an RGB image, with the fields of a form.

        Raises:
            ImageError: pypdfium2 is not installed; the file is no PDF, locked or damaged; it has no
                such page, or several of which none was named.
        """
        with self._opened() as page:
            image: Image.Image = page.render(scale=_scale(*page.get_size())).to_pil()
            return image.convert("RGB")

    def content(self) -> bytes:
        """What the image depends on."""
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
    """How many pages a PDF file has.

    Raises:
        ImageError: it cannot be read.
    """
    with _document(path, password) as document:
        return len(document)


def _scale(width: float, height: float) -> float:
    """Pixels per 72nd of an inch: those of DPI, or as many as keep to MAX_PIXELS."""
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
                # Before any page is looked at: without it, PDFium draws no field of a form.
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
    """Whether a file that was refused can be opened and has no pages: PDFium calls that whatever
    was wrong with the file before."""
    from pypdfium2 import raw

    key = None if password is None else password.encode() + b"\0"
    document = raw.FPDF_LoadDocument(str(path).encode("utf-8", "surrogateescape") + b"\0", key)
    if not document:
        return False
    raw.FPDF_CloseDocument(document)
    return True
