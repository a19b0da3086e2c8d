"""The listener's queue: how long a connection has waited in it, and what it has said by then.

Where there is no place for a new connection, one that waited in the kernel's queue and has not
sent its request in that time is not worth one. It is told apart before anything is made for it, so
that thousands of silent connections cost a request behind them in the queue no more than the
calls that close them.
"""

from __future__ import annotations

import re
import socket
import struct
import time

BACKLOG = 4096  # the operating system may allow fewer
_LOOK = 2**15  # bytes of a request that are looked at: the rest may wait for the server to read
_UNACKED = 24  # offset in Linux's struct tcp_info; of a listener: connections that wait in it
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*chunked", re.IGNORECASE)
_END, _LAST_CHUNK = b"\r\n\r\n", b"\r\n0\r\n\r\n"


class ListenerQueue:
    """Knows of a listener's connections the latest time at which they can have come.

    The queue is first in, first out: of N that waited when its length was read, the next N that
    are accepted had all come by then. Where the length is not known (not Linux, or a Unix socket),
    every connection counts as new.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._waited, self._then = 0, 0.0

    def came(self) -> float:
        """When the connection that was just accepted came at the latest, by time.monotonic()."""
        if self._waited:
            self._waited -= 1
            return self._then
        self._waited, self._then = self._length(), time.monotonic()
        return self._then

    def _length(self) -> int:
        try:
            said = self._listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED + 4)
            return int(struct.unpack_from("=I", said, _UNACKED)[0])
        except (AttributeError, OSError, struct.error):
            return 0


def has_asked(accepted: socket.socket, encrypted: bool) -> bool:
    """Whether a connection has sent a whole request, or so much of it that it may be waiting for
    the server to read. Nothing is taken from the connection, which must not block.

    Args:
        encrypted: whether TLS is spoken; then its first byte is enough.
    """
    try:
        said = accepted.recv(_LOOK, socket.MSG_PEEK)
    except OSError:
        return False
    if encrypted or len(said) >= _LOOK:
        return bool(said)
    end = said.find(_END)
    if end < 0:
        return False
    head = said[: end + 2]
    if _CHUNKED.search(head):
        return said.endswith(_LAST_CHUNK)
    length = _LENGTH.search(head)
    return length is None or len(said) - end - len(_END) >= int(length[1])
