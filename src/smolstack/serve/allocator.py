"""Settings of glibc's allocator for a long-running process that decodes untrusted images.

Once a block of up to 32 MiB has been freed, glibc allocates blocks of that size in its heaps, one
per thread, and does not return a heap to the system while memory at its end is in use. Decoding
images of many sizes in several threads then leaves most of each heap free but resident.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE = 4 * 2**20  # bytes ; larger blocks are mapped separately, and unmapped when freed
_ARENAS = 2


def return_memory() -> bool:
    """Return large blocks to the system as soon as they are freed.

    Must be called before other threads allocate memory.

    Returns:
        Whether the process uses glibc; with other C libraries, nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    chosen = ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _LARGE), (_ARENA_MAX, _ARENAS))
    return all(mallopt(option, value) == 1 for option, value in chosen)
