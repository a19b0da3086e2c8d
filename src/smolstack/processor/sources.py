"""Validate image sources: a file name or bytes."""

from __future__ import annotations

import os
from pathlib import Path

from smolstack.errors import ImageError
from smolstack.processor.pages import TiffPage

_LONGEST, _LONGEST_PART = 4096, 255  # maximum bytes of a path, and of one path component


def named(source: str | Path | bytes | TiffPage) -> tuple[str, str | Path | bytes]:
    """Return the file's name for error messages and its path, after checking that it exists.

    Raises:
        ImageError: the file does not exist or is empty.
    """
    if isinstance(source, TiffPage) and isinstance(source.path, bytes):
        source = source.path
    if isinstance(source, bytes):
        name, size = f"image of {len(source)} bytes", len(source)
    else:
        path = Path(source.path) if isinstance(source, TiffPage) else Path(source)  # type: ignore[arg-type]
        name = str(path if isinstance(source, TiffPage) else source)
        refuse_texts(name)
        try:
            if not path.is_file():
                there = "a pipe or device" if path.exists() else "no file"
                found = "a folder" if path.is_dir() else there
                raise ImageError(f"{name}: found {found}, expected an image")
            size = path.stat().st_size
        except OSError as error:  # for example a folder without permission
            raise ImageError(f"{name}: {error.strerror or error}, expected an image") from None
        source = path
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes), expected an image")
    return name, source


def refuse_texts(name: str) -> None:
    """Reject strings that cannot be file names, without repeating all of the string.

    Raises:
        ImageError: it is a data URL, a URL, or longer than a file name can be.
    """
    if name[:5].lower() == "data:":
        raise ImageError(
            f"found a data URL of {len(name):,} characters, expected a file name or the decoded "
            "bytes"
        )
    if name[:8].lower().startswith(("http://", "https://")):
        raise ImageError(f"{name[:200]} is a URL; images are read from files, not downloaded")
    if len(os.fsencode(name)) > _LONGEST or any(
        len(os.fsencode(part)) > _LONGEST_PART for part in Path(name).parts
    ):
        raise ImageError(
            f"a text of {len(name):,} characters ({name[:40]!r}…) is too long for a file name"
        )
