"""The kernel's listen queue: how long connections have waited in it, and what they have sent.

At the connection limit, a connection that has waited in the queue without sending a request is
closed before any resources are allocated for it. Thousands of silent connections then delay a
request behind them in the queue only by the time of the system calls that close them.
"""

from __future__ import annotations

import re
import socket
import struct
import time

BACKLOG = 4096  # the operating system may allow fewer
_LOOK = 2**15  # maximum bytes inspected; a client may send more only after the server has read
_UNACKED = 24  # offset in Linux's struct tcp_info; for a listener: connections in its queue
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*chunked", re.IGNORECASE)
_END, _LAST_CHUNK = b"\r\n\r\n", b"\r\n0\r\n\r\n"


class ListenerQueue:
    """Determines the latest time at which accepted connections can have arrived.

    The queue is first in, first out: if it has N connections when its length is read, the next N
    accepted connections had arrived by then. If the length is unknown (not Linux, or a Unix
    socket), each connection counts as new.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._waited, self._then = 0, 0.0

    def arrival_time(self) -> float:
        """Return the latest possible arrival time of the connection just accepted (monotonic)."""
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


def has_sent_request(accepted: socket.socket, encrypted: bool) -> bool:
    """Return whether a non-blocking connection has sent a complete request, or so much of one that
    it may be waiting for the server to read. The data stays in the connection's buffer.

    Args:
        encrypted: whether the connection uses TLS; then any data suffices.
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
