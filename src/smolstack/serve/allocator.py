"""glibc's allocator, set up for a process that lives long and decodes strangers' images.

Once blocks of up to 32 MiB have been freed, glibc serves blocks of that size from its heaps, one
per thread, and returns no heap to the system while anything at its end is in use. Images of many
sizes, decoded in several threads, then leave most of each heap free but resident.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE = 4 * 2**20  # bytes of a block that is mapped alone, and unmapped when it is freed
_ARENAS = 2


def return_memory() -> bool:
    """Have large blocks returned to the system as soon as they are freed.

    Must be called before threads allocate.

    Returns:
        Whether the process runs on glibc; elsewhere nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    chosen = ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _LARGE), (_ARENA_MAX, _ARENAS))
    return all(mallopt(option, value) == 1 for option, value in chosen)
