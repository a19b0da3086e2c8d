"""A memory limit for the bodies of all requests together, and the images that they download."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

from smolstack.serve.error_responses import RefusedError

_SMALL = (
    2 * 2**20
)  # bytes; up to this size, bodies may use memory that is reserved from larger ones
_SHARE = 0.75  # of the limit that larger bodies may use
# The body of the request that the current task answers; None outside of requests.
CURRENT: ContextVar[IncomingBody | None] = ContextVar("body", default=None)
_GRACE = 1.0  # seconds in which an arriving body is not ended in favor of others


class BodyMemory:
    """Counts the bytes of bodies in flight, from their arrival until their requests end.

    A body for which there is no memory waits: nothing is read from its client. The body that has
    been arriving for longest is ended for it, so that slow clients cannot hold the memory.

    Attributes:
        limit: maximum number of bytes.
        held: current number of bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.arriving: dict[IncomingBody, None] = {}  # in the order of their start
        self._changed = asyncio.Event()
        self._end: RefusedError | None = None

    def begin(self) -> IncomingBody:
        """Register a body that begins to arrive."""
        incoming = IncomingBody(self)
        self.arriving[incoming] = None
        if self._end is not None:
            incoming.refuse(self._end)
        return incoming

    def end(self, refusal: RefusedError) -> None:
        """Refuse all incomplete bodies, now and later."""
        self._end = refusal
        for incoming in self.arriving:
            incoming.refuse(refusal)

    def has_room(self, more: int, size: int) -> bool:
        """Whether ``more`` bytes of a body that grows to ``size`` bytes fit."""
        return self.held + more <= self.limit * (1.0 if size <= _SMALL else _SHARE)

    async def wait(self, seconds: float) -> None:
        """Wait for memory to be freed, for a limited time."""
        self._changed.clear()
        self._make_room()
        await asyncio.wait_for(self._changed.wait(), min(seconds, _GRACE))

    def changed(self) -> None:
        self._changed.set()

    def _make_room(self) -> None:
        now = time.monotonic()
        for incoming in self.arriving:
            if now - incoming.began < _GRACE:
                return  # all others are newer
            if incoming.size and not incoming.waiting and incoming.refusal is None:
                incoming.refuse(
                    RefusedError(
                        503,
                        "the body arrived too slowly while others waited for memory; send it again",
                        headers={"Connection": "close", "Retry-After": "1"},
                    )
                )
                return


class IncomingBody:
    """One arriving body, and what is downloaded for its request.

    Attributes:
        size: bytes received.
        refusal: why the body is refused; ``refused`` is set when this is.
        waiting: whether the body waits for memory, and so is not slow by itself.
    """

    def __init__(self, bodies: BodyMemory) -> None:
        self.bodies, self.size, self.began = bodies, 0, time.monotonic()
        self.refused = asyncio.Event()
        self.refusal: RefusedError | None = None
        self.waiting = False

    def refuse(self, refusal: RefusedError) -> None:
        """Refuse the body."""
        if self.refusal is None:
            self.refusal = refusal
            self.refused.set()

    async def take(self, more: int, until: float) -> None:
        """Count received bytes, after waiting for memory if necessary.

        Raises:
            RefusedError: there was no memory before ``until``.
        """
        self.waiting = True
        try:
            while not self.bodies.has_room(more, self.size + more):
                left = until - time.monotonic()
                if left <= 0:
                    raise RefusedError(
                        429,
                        f"the bodies of other requests use all of the {self.bodies.limit:,} bytes "
                        "reserved for bodies",
                        headers={"Connection": "close", "Retry-After": "5"},
                    )
                if self.refusal is not None:
                    raise self.refusal
                try:
                    await self.bodies.wait(left)
                except asyncio.TimeoutError:
                    continue
        finally:
            self.waiting = False
        self.size += more
        self.bodies.held += more

    def complete(self) -> None:
        """The body is complete; its bytes still count until :meth:`close`."""
        self.bodies.arriving.pop(self, None)

    def close(self) -> None:
        """The request has ended; release the bytes."""
        self.complete()
        self.bodies.held -= self.size
        self.size = 0
        self.bodies.changed()
