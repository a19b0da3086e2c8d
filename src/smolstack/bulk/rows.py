"""What bulk work counts in: rows of the input, and the windows that they are stored by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smolstack.errors import ImageError


@dataclass(frozen=True)
class Row:
    """One image of the input.

    Attributes:
        index: its place in the input, from 0.
        id: what the user calls it: the id column's value, else its path as written, else its place.
        path: an absolute path, or None for an image given as bytes.
        content: the image file's bytes, or None for a path.
        error: why the input holds no image here, or None.
    """

    index: int
    id: str
    path: str | None = None
    content: bytes | None = None
    error: str | None = None

    @property
    def image(self) -> str | bytes:
        """The image as the processor takes it.

        Raises:
            ImageError: the input holds none here.
        """
        if self.error is not None:
            raise ImageError(self.error)
        source = self.path if self.content is None else self.content
        if source is None:
            raise ImageError("neither a path nor bytes stand here, expected an image")
        return source


@dataclass(frozen=True, order=True)
class Window:
    """Rows ``start`` to ``stop`` (not included): read, batched and stored together."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def windows(rows: int, size: int) -> Iterator[Window]:
    """All windows of an input of so many rows."""
    for start in range(0, rows, size):
        yield Window(start, min(start + size, rows))


def plain(text: str) -> str:
    """Text that every format can hold: a lone surrogate, as in odd file names, becomes ``?``."""
    return text.encode("utf-8", "replace").decode("utf-8")
