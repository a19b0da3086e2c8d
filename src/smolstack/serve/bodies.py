"""The bodies of all requests together: how much of them is in memory, and who gives way."""

from __future__ import annotations

import asyncio
import time

from smolstack.serve.error_responses import RefusedError

_SMALL = 2 * 2**20  # up to here a body finds room that large ones leave free
_SHARE = 0.75  # of the room, for larger ones
_GRACE = 1.0  # seconds for which a body may arrive, however many others want its room


class Bodies:
    """Bytes of bodies in flight, from their arrival until their requests have ended.

    A body that finds no room waits: its client is not read from. One that has been arriving for
    longest gives way to it, so that nobody keeps the room by sending slowly.

    Attributes:
        limit: bytes at most.
        held: bytes now.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.arriving: dict[Arrival, None] = {}  # in the order of their beginning
        self._changed = asyncio.Event()
        self._end: RefusedError | None = None

    def begin(self) -> Arrival:
        """A body begins to arrive."""
        arrival = Arrival(self)
        self.arriving[arrival] = None
        if self._end is not None:
            arrival.refuse(self._end)
        return arrival

    def end(self, refusal: RefusedError) -> None:
        """Refuse every body that is not complete."""
        self._end = refusal
        for arrival in self.arriving:
            arrival.refuse(refusal)

    def has_room(self, more: int, size: int) -> bool:
        """Whether ``more`` bytes fit, of a body that will have ``size``."""
        return self.held + more <= self.limit * (1.0 if size <= _SMALL else _SHARE)

    async def wait(self, seconds: float) -> None:
        """Wait until something has changed."""
        self._changed.clear()
        self._make_room()
        await asyncio.wait_for(self._changed.wait(), min(seconds, _GRACE))

    def changed(self) -> None:
        self._changed.set()

    def _make_room(self) -> None:
        now = time.monotonic()
        for arrival in self.arriving:
            if now - arrival.began < _GRACE:
                return  # so are all that follow
            if arrival.size and not arrival.waiting and arrival.refusal is None:
                arrival.refuse(
                    RefusedError(
                        503,
                        "the body arrived slowly and gave way to others; send it again",
                        headers={"Connection": "close", "Retry-After": "1"},
                    )
                )
                return


class Arrival:
    """One body.

    Attributes:
        size: bytes so far.
        refusal: why it is not waited for any longer; ``refused`` is set then.
        waiting: whether it waits for room: it is not slow by itself.
    """

    def __init__(self, bodies: Bodies) -> None:
        self.bodies, self.size, self.began = bodies, 0, time.monotonic()
        self.refused = asyncio.Event()
        self.refusal: RefusedError | None = None
        self.waiting = False

    def refuse(self, refusal: RefusedError) -> None:
        """End the wait for it."""
        if self.refusal is None:
            self.refusal = refusal
            self.refused.set()

    async def take(self, more: int, until: float) -> None:
        """Count bytes that came, once there is room for them.

        Raises:
            RefusedError: there was none in time.
        """
        self.waiting = True
        try:
            while not self.bodies.has_room(more, self.size + more):
                left = until - time.monotonic()
                if left <= 0:
                    raise RefusedError(
                        429,
                        f"the bodies of other requests take the {self.bodies.limit:,} bytes that "
                        "there are for them",
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
        """All of it is here; its bytes count on."""
        self.bodies.arriving.pop(self, None)

    def close(self) -> None:
        """The request has ended."""
        self.complete()
        self.bodies.held -= self.size
        self.size = 0
        self.bodies.changed()
