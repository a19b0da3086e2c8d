"""Pages of PDF files as pictures: ``report.pdf#page=3`` is the third page of report.pdf.

Pages are rendered by PDFium (package pypdfium2) at DPI, twice the size that PDF counts in, as
docling does for the document models of this family. PDFium works on one page at a time, whatever
threads ask.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from smolstack.errors import ImageError

SUFFIX = ".pdf"
DPI = 144
_SCALE = DPI / 72  # PDF counts in 72nds of an inch
_PAGE = re.compile(r"(.+\.pdf)#page=(\d{1,6})", re.IGNORECASE | re.DOTALL)
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF file; ``number`` is 1 for the first, None where none was named."""

    path: Path
    number: int | None

    def __str__(self) -> str:
        return str(self.path) if self.number is None else f"{self.path}#page={self.number}"

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, without rendering.

        Raises:
            ImageError: as :meth:`render`.
        """
        with self._opened() as page:
            width, height = page.get_size()
        return math.ceil(width * _SCALE), math.ceil(height * _SCALE)

    def render(self) -> Image.Image:
        """The page as an RGB picture.

        Raises:
            ImageError: pypdfium2 is not installed; the file is no PDF, locked or damaged; it has no
                such page, or several of which none was named.
        """
        with self._opened() as page:
            picture: Image.Image = page.render(scale=_SCALE).to_pil()
        return picture.convert("RGB")

    def content(self) -> bytes:
        """What the picture depends on."""
        return self.path.read_bytes() + f"#page={self.number}".encode()

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with _document(self.path) as document:
            count = len(document)
            if self.number is None and count != 1:
                raise ImageError(
                    f"{self.path} has {count} pages, expected one of them, as in {self.path}#page=1"
                )
            number = 1 if self.number is None else self.number
            if not 1 <= number <= count:
                raise ImageError(f"{self.path} has {count} pages, expected no page {self.number}")
            with _refused(self.path):
                yield document[number - 1]


def page_of(source: object) -> PdfPage | None:
    """The page that a path names; None for anything else."""
    if not isinstance(source, (str, Path)):
        return None
    name = str(source)
    found = _PAGE.fullmatch(name)
    if found is not None and not Path(source).is_file():
        return PdfPage(Path(found[1]), int(found[2]))
    if name.lower().endswith(SUFFIX):
        return PdfPage(Path(source), None)
    return None


def count_pages(path: Path) -> int:
    """How many pages a PDF file has.

    Raises:
        ImageError: it cannot be read.
    """
    with _document(path) as document:
        return len(document)


@contextmanager
def _document(path: Path) -> Iterator[Any]:
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
        with _refused(path):
            document = pypdfium2.PdfDocument(path)
        try:
            yield document
        finally:
            document.close()


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    import pypdfium2

    try:
        yield
    except pypdfium2.PdfiumError as error:
        raise ImageError(f"{path} cannot be read as a PDF file: {error}") from error
