"""A limit on what decoders hold in memory at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from smolstack.errors import ImageError

DEFAULT_BYTES = 4 * 2**30
_SMALL = 64  # an image is small that takes less than this part of all
_KEPT = 8  # a part that is kept for them


class DecodingMemory:
    """Bytes that decoding may take, over all threads.

    Who asks for more than is left waits until others are done: large images in turn, so that small
    ones do not overtake one for ever; small ones, for which a part is left, do not wait for those
    that wait.

    Attributes:
        limit: bytes in flight at most; an image that takes more by itself is refused.
    """

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self._held = 0
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # a large image is not overtaken by small ones for ever

    @property
    def held(self) -> int:
        """Bytes in flight."""
        return self._held

    @contextmanager
    def hold(self, size: int, name: str) -> Iterator[None]:
        """Count ``size`` bytes while the block runs. Not to be nested.

        Raises:
            ImageError: ``size`` is more than the limit.
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
                # Larger than all but what is kept for small ones: alone.
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
