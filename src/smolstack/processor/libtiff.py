"""Keep libtiff from writing to stderr.

By default it prints a line for every damaged row, past Python's logging: a small fax-coded TIFF
file would fill a server's log. What stops it from decoding reaches Pillow, and becomes an
exception.
"""

from __future__ import annotations

import ctypes
from functools import cache

from PIL import _imaging


@cache
def silence() -> None:
    """Remove libtiff's handlers of errors and warnings, once per process.

    Nothing happens where Pillow's library does not export them.
    """
    try:
        library = ctypes.CDLL(_imaging.__file__)  # its symbols, and those of what it links to
        setters = library.TIFFSetErrorHandler, library.TIFFSetWarningHandler
    except (AttributeError, OSError, TypeError):
        return
    for setter in setters:
        setter.argtypes, setter.restype = (ctypes.c_void_p,), ctypes.c_void_p
        setter(None)
