"""Units of a bulk job: rows of the input, and windows of rows that are stored together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smolstack.errors import ImageError


@dataclass(frozen=True)
class Row:
    """One image of the input.

    Attributes:
        index: index in the input, from 0.
        id: the id column's value, else the path as written, else the index.
        path: an absolute path, or None for an image given as bytes.
        content: the image file's bytes, or None for a path.
        error: why the row has no image, or None.
    """

    index: int
    id: str
    path: str | None = None
    content: bytes | None = None
    error: str | None = None

    @property
    def image(self) -> str | bytes:
        """Return the image in a form that the processor accepts.

        Raises:
            ImageError: the row has no image.
        """
        if self.error is not None:
            raise ImageError(self.error)
        source = self.path if self.content is None else self.content
        if source is None:
            raise ImageError("found neither a path nor bytes, expected an image")
        return source


@dataclass(frozen=True, order=True)
class Window:
    """Rows ``start`` to ``stop`` (exclusive): read, batched and stored together."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def windows(rows: int, size: int) -> Iterator[Window]:
    """Yield all windows of an input with the given number of rows."""
    for start in range(0, rows, size):
        yield Window(start, min(start + size, rows))


def plain(text: str) -> str:
    """Return text that every format can store: lone surrogates, as in unusual file names, become
    ``?``.
    """
    return text.encode("utf-8", "replace").decode("utf-8")
