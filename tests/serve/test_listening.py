"""The listener's queue: which connections have sent a request, and when they arrived."""

from __future__ import annotations

import socket
import sys
import time

import pytest

from smolstack.serve.listening import ListenerQueue, has_sent_request

POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
LONG = POST + b"Content-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        (b"", False),
        (b"GET / HTTP/1.1\r\nX: ", False),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (POST + b"content-length: 4\r\n\r\n{}", False),
        (POST + b"content-length: 2\r\n\r\n{}", True),
        (LONG + b"{", False),
        (LONG + b"x" * 2**15, True),  # the rest may be waiting for the server to read
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", False),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True),
    ],
)
def test_what_counts_as_a_request(said: bytes, asked: bool) -> None:
    client, server = socket.socketpair()
    with client, server:
        server.setblocking(False)
        client.sendall(said)
        assert has_sent_request(server, False) is asked
        assert server.recv(len(said) or 1) == said if said else True


def test_of_tls_the_first_byte_is_enough() -> None:
    client, server = socket.socketpair()
    with client, server:
        server.setblocking(False)
        assert not has_sent_request(server, True)
        client.sendall(b"\x16")
        assert has_sent_request(server, True)


@pytest.mark.skipif(sys.platform != "linux", reason="the queue's length is told by Linux")
def test_those_that_waited_came_before_the_queue_was_looked_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(4)]
        queue, arrived = ListenerQueue(listener), []
        for _ in clients:
            accepted, _address = listener.accept()
            arrived.append(queue.arrival_time())
            accepted.close()
        clients.append(socket.create_connection(listener.getsockname()))
        before = time.monotonic()
        listener.accept()[0].close()
        assert arrived == [arrived[0]] * 4
        assert queue.arrival_time() >= before
        for client in clients:
            client.close()


def test_a_socket_whose_queue_is_not_known_has_new_connections_alone() -> None:
    made, other = socket.socketpair()
    with made, other:
        before = time.monotonic()
        assert ListenerQueue(made).arrival_time() >= before
