"""Limits on the number of connections and on the time that each may keep the server waiting.

uvicorn limits only the time of idle connections. Here, connections are accepted one at a time up to
a limit. At the limit, the connections that have kept the server waiting longest are closed; if no
client keeps the server waiting, no connections are accepted. Time that a connection has spent in
the listen queue counts as well. Silent connections therefore delay others only by the time it
takes to close them, and file descriptors remain available for other uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from smolstack.errors import GenerationError
from smolstack.serve.listening import ListenerQueue, has_sent_request

DEFAULT_CONNECTIONS = 512
# Seconds that a client may keep the server waiting even at the limit. Shorter if the limit is low,
# so that connections do not wait long in the listen queue.
_GRACE, _GRACE_PLACES = (0.05, 0.5), 1000
_CLOSED_SHARE = 16  # at the limit, one connection of this many is closed at once
_RATE = 2**16  # bytes of a body that halve the waiting time counted against its connection
_MINIMUM = 4
_AT_A_TIME = 16  # connections accepted before yielding to the event loop
_CHECK_SECONDS = 0.25  # seconds between timeout checks
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"connection: close\r\n\r\nThe headers did not arrive in time."
)


def connection_limit(wanted: int | None) -> int:
    """Return the maximum number of open connections, given the process's limit of open files.

    Args:
        wanted: the requested number; None: a default.

    Raises:
        GenerationError: the limit of open files allows fewer than requested, or too few.
    """
    left = _descriptors_left()
    if left is not None and left < (wanted or _MINIMUM):
        expected = _MINIMUM if wanted is None else wanted
        raise GenerationError(
            f"the limit of open files leaves {max(0, left)} for connections, expected {expected} "
            "or more; raise it (ulimit -n) or lower --max-connections"
        )
    if wanted is not None:
        return wanted
    return DEFAULT_CONNECTIONS if left is None else min(DEFAULT_CONNECTIONS, left)


def _descriptors_left() -> int | None:
    """Return the file descriptors available for connections; None: unlimited or unknown."""
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return None
    own = 32
    with contextlib.suppress(OSError):
        own = len(os.listdir("/proc/self/fd"))
    # Reserved for downloads, cache files and files that libraries open.
    return soft - own - min(64, soft // 4)


class Connection(H11Protocol):
    """uvicorn's connection, extended to measure how long its client keeps the server waiting.

    Attributes:
        since: start of the present waiting period, as time.monotonic().
        arrived: arrival in the listen queue.
        first_read_done: whether data that had arrived at the time of acceptance has been read.
        headers_begun: whether a part of a request's headers has been received.
        request_received: whether complete headers have been received before.
        response_sent: whether a response has been completed.
        received: bytes received since ``since``.
        unread_since: time since which the client has not read its response; None: it reads.
    """

    def __init__(self, *args: Any, limiter: ConnectionLimiter, **named: Any) -> None:
        super().__init__(*args, **named)
        self.limiter = limiter
        self.since = time.monotonic()
        self.arrived = self.since
        self.first_read_done = False
        self.headers_begun = self.request_received = False
        self.response_sent = False
        self.received = 0
        self.unread_since: float | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.limiter.open.add(self)
        # The event loop reads from the connection for the first time in its next iteration; only
        # after that is it known whether the client has sent anything.
        self.loop.call_soon(self.loop.call_soon, setattr, self, "first_read_done", True)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.limiter.remove(self)

    def data_received(self, data: bytes) -> None:
        before, now = self.cycle, time.monotonic()
        if self.awaits_request and not self.headers_begun:
            self.headers_begun, self.since = True, now
        super().data_received(data)
        self.received += len(data)
        if self.cycle is not before:
            self.since, self.received = now, 0
            self.headers_begun, self.request_received = False, True

    def on_response_complete(self) -> None:
        self.since, self.headers_begun, self.response_sent = time.monotonic(), False, True
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.unread_since = None
        super().resume_writing()

    @property
    def awaits_request(self) -> bool:
        """Whether the server is waiting for a request's headers."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def idle(self) -> bool:
        """Whether the last response is complete and no further request has begun."""
        return self.awaits_request and self.request_received and not self.headers_begun

    def waited(self, now: float) -> float | None:
        """Seconds that the client has kept the server waiting; None if the server is working."""
        if self.unread_since is not None:
            return now - self.unread_since
        if self.first_read_done and (self.awaits_request or self.cycle.more_body):
            return now - (self.since if self.response_sent else self.arrived)
        return None

    def is_late(self, now: float) -> bool:
        """Whether the headers, or reading the response, have exceeded their timeout."""
        if self.unread_since is not None:
            return now - self.unread_since > self.limiter.read_seconds
        return self.awaits_request and now - self.since > self.limiter.header_seconds

    def disconnect(self) -> None:
        """Close the connection; an incomplete request is answered with a 408."""
        if self.awaits_request and self.headers_begun and self.unread_since is None:
            self.transport.write(_TOO_SLOW)
            self.transport.close()
        else:
            self.transport.abort()


class ConnectionLimiter:
    """Accepts connections up to a limit.

    Args:
        limit: maximum number of connections.
        header_seconds: timeout for a request's headers.
        read_seconds: timeout for a client that does not read its response.
    """

    def __init__(self, limit: int, header_seconds: float, read_seconds: float) -> None:
        self.limit, self.header_seconds, self.read_seconds = limit, header_seconds, read_seconds
        self.open: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._freed = asyncio.Event()

    def start(
        self,
        listeners: list[socket.socket],
        make: Callable[[], Connection],
        context: ssl.SSLContext | None,
    ) -> None:
        """Start accepting connections in the running event loop."""
        for listener in listeners:
            listener.setblocking(False)
            self._tasks.append(asyncio.create_task(self._accept(listener, make, context)))
        self._tasks.append(asyncio.create_task(self._check_timeouts()))

    async def close(self) -> None:
        """Stop accepting connections; open ones stay open."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def remove(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self.open.discard(connection)
        self._freed.set()

    async def _accept(
        self,
        listener: socket.socket,
        make: Callable[[], Connection],
        context: ssl.SSLContext | None,
    ) -> None:
        loop, count, queue = asyncio.get_running_loop(), 0, ListenerQueue(listener)
        while True:
            count += 1
            if count % _AT_A_TIME == 0:
                await asyncio.sleep(0)
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._make_room()
                    await asyncio.sleep(_CHECK_SECONDS)
                continue  # the client disconnected before
            arrived = queue.arrival_time()
            if self._full:
                waited = time.monotonic() - arrived > self._grace
                if waited and not has_sent_request(accepted, context is not None):
                    accepted.close()
                    continue
                try:
                    await self._wait_for_room()
                except asyncio.CancelledError:
                    accepted.close()
                    raise
            task = asyncio.create_task(self._connect(accepted, make, context, arrived))
            self._connecting.add(task)
            task.add_done_callback(self._connected)

    async def _connect(
        self,
        accepted: socket.socket,
        make: Callable[[], Connection],
        context: ssl.SSLContext | None,
        arrived: float,
    ) -> None:
        def made() -> Connection:
            connection = make()
            connection.arrived = arrived
            return connection

        seconds = None if context is None else self.header_seconds
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                made, accepted, ssl=context, ssl_handshake_timeout=seconds
            )
        except (OSError, ssl.SSLError):  # TLS handshake failed, or disconnected
            accepted.close()

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        self._freed.set()

    @property
    def _full(self) -> bool:
        return len(self.open) + len(self._connecting) >= self.limit

    @property
    def _grace(self) -> float:
        """Seconds that a client may keep the server waiting at the limit."""
        return min(max(self.limit / _GRACE_PLACES, _GRACE[0]), _GRACE[1])

    async def _wait_for_room(self) -> None:
        """Wait until another connection may be accepted."""
        while self._full:
            self._freed.clear()
            if not self._make_room():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), min(_CHECK_SECONDS, self._grace))
                continue
            await self._freed.wait()

    def _make_room(self) -> bool:
        """Close the connections that have kept the server waiting longest: idle ones if there are
        any, otherwise those beyond the grace period. Return False if there are none."""
        now = time.monotonic()
        waits = {c: c.waited(now) or 0.0 for c in self.open if not c.transport.is_closing()}
        idle = {c: seconds for c, seconds in waits.items() if c.idle}
        late = idle or {c: seconds for c, seconds in waits.items() if seconds > self._grace}
        order = sorted(late, key=lambda c: late[c] / (1 + c.received / _RATE), reverse=True)
        for connection in order[: max(1, self.limit // _CLOSED_SHARE)]:
            connection.disconnect()
        return bool(late)

    async def _check_timeouts(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            now = time.monotonic()
            for connection in [each for each in self.open if each.is_late(now)]:
                connection.disconnect()
