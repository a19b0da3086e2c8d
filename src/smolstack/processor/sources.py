"""What an image is given as: a file's name, or its bytes; and what is neither."""

from __future__ import annotations

import os
from pathlib import Path

from smolstack.errors import ImageError
from smolstack.processor.pages import TiffPage

_LONGEST, _LONGEST_PART = 4096, 255  # bytes of a path, and of a name in it


def named(source: str | Path | bytes | TiffPage) -> tuple[str, str | Path | bytes]:
    """The name of a file for errors, and the file, once it is known to be there.

    Raises:
        ImageError: there is no such file, or it is empty.
    """
    if isinstance(source, bytes):
        name, size = f"image of {len(source)} bytes", len(source)
    else:
        path = source.path if isinstance(source, TiffPage) else Path(source)
        name = str(path if isinstance(source, TiffPage) else source)
        refuse_texts(name)
        try:
            if not path.is_file():
                found = "a folder" if path.is_dir() else "no file"
                raise ImageError(f"{name}: found {found}, expected an image")
            size = path.stat().st_size
        except OSError as error:  # a folder that may not be looked into, say
            raise ImageError(f"{name}: {error.strerror or error}, expected an image") from None
        source = path
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes), expected an image")
    return name, source


def refuse_texts(name: str) -> None:
    """Refuse what stands in the place of a file's name and is none, without repeating all of it.

    Raises:
        ImageError: it is a data URL, an address, or longer than a name can be.
    """
    if name[:5].lower() == "data:":
        raise ImageError(
            f"found a data URL of {len(name):,} characters, expected a file's name, or the bytes "
            "that its base64 stands for"
        )
    if name[:8].lower().startswith(("http://", "https://")):
        raise ImageError(f"{name[:200]} is an address; images are read from files, not fetched")
    if len(os.fsencode(name)) > _LONGEST or any(
        len(os.fsencode(part)) > _LONGEST_PART for part in Path(name).parts
    ):
        raise ImageError(
            f"a text of {len(name):,} characters ({name[:40]!r}…) is longer than a file's name "
            "can be"
        )
