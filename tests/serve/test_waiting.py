"""What the server waits for, and for how long: bodies, images from elsewhere, clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.serve.test_chat import asking

import smolstack
from smolstack.cli.serve_address import listen
from smolstack.serve import request_reader
from smolstack.serve.middleware import Guard
from smolstack.serve.pending_answers import EventStream
from smolstack.serve.server import Server
from smolstack.serve.settings import ServerSettings


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, ServerSettings(body_seconds=0.01), lambda path, status: None)
    scope = {"type": "http", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(guard(scope, never, send))
    assert sent[0]["status"] == 408
    assert b"did not arrive within 0.01 s" in sent[1]["body"]


def test_a_deadline_ends_the_wait_for_images_too(
    tiny_vlm: smolstack.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_reader, "fetch", lambda url, **limits: never())
    server = Server(tiny_vlm, ServerSettings(allow_remote_images=True))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"messages": asking("http://example.com/a.png"), "deadline": 0.05}
            return await client.post("/v1/chat/completions", json=body)

    try:
        response = asyncio.run(ask())
    finally:
        server.close()
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline"


def test_a_client_gone_before_its_stream_begins_stops_its_work() -> None:
    class Asked:
        closed = False

        def close(self) -> None:
            self.closed = True

    async def events() -> AsyncIterator[str]:
        yield "data: never sent\n\n"

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    asked: Any = Asked()
    stream = EventStream(events(), asked)
    asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send))
    assert asked.closed


def test_events_leave_at_once() -> None:
    with listen("127.0.0.1", 0) as listener:
        # What asyncio asks before it switches Nagle's algorithm off.
        assert listener.proto == socket.IPPROTO_TCP
