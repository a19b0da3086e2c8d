"""Which addresses images may be fetched from, and what may come from there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from smolstack.serve import remote
from smolstack.serve.body_memory import CURRENT, BodyMemory
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.remote import fetch, is_public

INSIDE = (
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 224.0.0.1 "
    "240.0.0.1 255.255.255.255 192.0.2.1 198.18.0.1 ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 "
    "::ffff:10.0.0.1 64:ff9b::a00:1 2002:7f00:1:: 2001:db8::1 fec0::1 64:ff9b:1::a00:1 3fff::1 "
    "192.88.99.1"
)


@pytest.mark.parametrize("address", INSIDE.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


class Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind = self.path.strip("/")
        if kind == "inside":
            self.send_response(302)
            self.send_header("Location", "http://10.0.0.1/secret.png")
        elif kind == "loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
        elif kind == "missing":
            self.send_response(404)
        else:
            self.send_response(200)
        self.end_headers()
        if kind == "large":
            self.wfile.write(b"x" * 5000)
        if kind == "image":
            self.wfile.write(b"an image")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host on this machine that counts as public for once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    yield f"http://localhost:{server.server_address[1]}"
    server.shutdown()


def get(url: str) -> bytes:
    return asyncio.run(fetch(url, max_bytes=1000, seconds=5))


def test_an_image_is_fetched(host: str) -> None:
    assert get(f"{host}/image") == b"an image"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("inside", "10.0.0.1"),
        ("loop", "redirects more than 3 times"),
        ("missing", "status 404"),
        ("large", "larger than 1,000 bytes"),
    ],
)
def test_what_is_not_fetched(host: str, path: str, expected: str) -> None:
    with pytest.raises(RefusedError, match=expected):
        get(f"{host}/{path}")


def test_downloads_count_as_bodies(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen images of 16 MiB in each of many requests would otherwise be held at once."""
    monkeypatch.setattr(remote, "_SHARE", 0.0)  # without waiting for memory
    bodies = BodyMemory(900)

    async def download() -> tuple[bytes, int]:
        incoming = bodies.begin()
        CURRENT.set(incoming)
        content = await fetch(f"{host}/image", max_bytes=10_000, seconds=5)
        held = bodies.held
        with pytest.raises(RefusedError, match="use all of the 900 bytes") as caught:
            await fetch(f"{host}/large", max_bytes=10_000, seconds=5)
        assert caught.value.status == 429
        incoming.close()
        return content, held

    assert asyncio.run(download()) == (b"an image", 8)
    assert bodies.held == 0
