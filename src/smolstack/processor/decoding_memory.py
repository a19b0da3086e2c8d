"""Limits the memory that decoders use concurrently."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from smolstack.errors import ImageError

DEFAULT_BYTES = 4 * 2**30
_SMALL = 64  # an image is small if it takes less than this fraction
_KEPT = 8  # fraction reserved for small images


class DecodingMemory:
    """Memory budget of decoding, shared by all threads.

    A request for more than is left waits until others finish. Large images wait in order, so that
    small ones cannot starve them; small ones, which have a reserve, do not wait behind large ones.

    Attributes:
        limit: maximum bytes in use; an image that needs more by itself is rejected.
    """

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self._held = 0
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # keeps small images from starving a large one

    @property
    def held(self) -> int:
        """Bytes in use."""
        return self._held

    @contextmanager
    def hold(self, size: int, name: str) -> Iterator[None]:
        """Count ``size`` bytes as used while the block runs. Must not be nested.

        Raises:
            ImageError: ``size`` exceeds the limit.
        """
        if size > self.limit:
            raise ImageError(
                f"{name} takes {size:,} bytes to decode, more than the {self.limit:,} that are "
                "allowed"
            )
        kept = self.limit // _KEPT
        if size * _SMALL <= self.limit:
            self._take(size, self.limit)
        else:
            with self._turn:
                # An image larger than everything but the reserve runs alone.
                self._take(size, max(size, self.limit - kept))
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()

    def _take(self, size: int, most: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._held + size <= most)
            self._held += size


MEMORY = DecodingMemory()  # of this process: threads share its memory
