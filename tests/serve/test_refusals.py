"""What the server does not do: limits, keys, hostile bodies, private addresses."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from tests.bombs import icon, tiff
from tests.serve.conftest import Process, data_url, serving
from tests.serve.test_chat import asking

KEY = {"Authorization": "Bearer secret"}


def png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(content, "png")
    return content.getvalue()


def saved(kind: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, kind)
    return content.getvalue()


def nested(depth: int) -> dict[str, Any]:
    """A response_format whose objects stand so deep in each other."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"in": schema}}
    return {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side² pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def post(
    server: Process,
    body: Any,
    headers: dict[str, str] | None = None,
    route: str = "chat/completions",
) -> httpx.Response:
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return httpx.post(
        f"{server.url}/v1/{route}",
        content=content,
        headers={"Content-Type": "application/json", **(headers or {})},
        timeout=60,
    )


def message(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    text: str = error["message"]
    return text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "?"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "image_url"),
        ({"messages": "hello"}, "list"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "unicode"),
        ({"model": "\ud800"}, "model is not valid Unicode"),
        ({"response_format": {"type": "json_object", "schema": {"\ud800": 1}}}, "unicode"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 99}, "n is 99"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: Field required"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1: Input should be less than or equal to 100"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"regex": "("}, "regex '(' is not supported"),
        ({"regex": "a", "choices": ["b"]}, "found regex and choices"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        (
            {"response_format": {"type": "json_object"}, "guided_json": {"type": "integer"}},
            "found guided_json and response_format, expected only one of them",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "schema is not supported",
        ),
        ({"messages": asking("http://example.com/a.png")}, "does not download images"),
        ({"messages": asking("file:///etc/passwd")}, "neither a data URL nor"),
        ({"messages": asking("data:image/png;base64,%%%")}, "valid base64"),
        ({"messages": asking("data:,hello")}, "not a data URL"),
        ({"messages": asking(data_url(b""))}, "empty"),
        ({"messages": asking(data_url(tiff(16, 30_000)))}, "in tiles of 30000x30000"),
        ({"messages": asking(data_url(icon(5000)))}, "holds an image of 5000x5000"),
        ({"messages": asking(data_url(b"not an image"))}, "is not an image in a supported format"),
        ({"messages": asking(data_url(png(64, 64)[:60]))}, "damaged or truncated"),
        (
            {"messages": asking(data_url(bomb(10_000)))},
            "pixels, more than the 40,000,000",
        ),
        ({"messages": asking(data_url(bomb(60_000)))}, "too large to decode"),
        ({"messages": asking(*[data_url(png(8, 8))] * 17)}, "17 images, at most 16"),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, "the model's context"),
        ({"messages": [{"role": "user", "content": "long " * 90_000}]}, "450,000 characters"),
        ({"messages": asking(data_url(saved("tga")))}, "is not an image in a supported format"),
        ({"response_format": nested(300)}, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_gets_one_sentence(
    server: Process, change: dict[str, Any], expected: str
) -> None:
    body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 4, **change}
    response = post(server, body)
    assert response.status_code == 400, response.text
    assert expected.lower() in message(response).lower()


def test_a_truncated_jpeg_whose_header_is_whole_is_refused(server: Process) -> None:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, "jpeg")
    body = {"messages": asking(data_url(content.getvalue()[:9000], "jpeg")), "max_tokens": 4}
    for stream in (False, True):
        response = post(server, {**body, "stream": stream})
        assert response.status_code == 400
        assert "damaged or truncated" in message(response)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        b"\xff\xfe",
        "[" * 100_000,
        '{"messages":' * 50_000,
        '{"messages": [{"role": "user", "content": "?"}], "seed": ' + "9" * 5000 + "}",
        '{"messages": [{"role": "user", "content": "?"}], "temperature": NaN}',
        '{"messages": [{"role": "user", "content": "?"}], "temperature": 1e999}',
    ],
    ids=lambda value: str(value)[:24],
)
def test_hostile_json_is_a_bad_request(server: Process, body: bytes | str) -> None:
    response = post(server, body)
    assert response.status_code == 400, response.text
    assert message(response)


def test_the_server_has_failed_at_nothing_so_far(server: Process) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    assert 'status="5' not in text
    assert server.said == []


def test_a_key_is_asked_for(tight: Process) -> None:
    for key in ("wrong", "sécret"):
        response = httpx.get(
            f"{tight.url}/v1/models", headers=[(b"Authorization", f"Bearer {key}".encode())]
        )
        assert response.status_code == 401
        assert "API key" in message(response)
    with tight.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with tight.client("secret") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{tight.url}/health").status_code == 200
    assert httpx.get(f"{tight.url}/").status_code == 200
    assert httpx.get(f"{tight.url}/metrics").status_code == 401


def test_a_large_body_is_refused_however_it_comes(tight: Process) -> None:
    large = b'{"messages": "' + b"x" * 400_000 + b'"}'
    assert post(tight, large, KEY).status_code == 413

    def parts() -> Iterator[bytes]:
        for start in range(0, len(large), 50_000):
            yield large[start : start + 50_000]

    response = httpx.post(
        f"{tight.url}/v1/chat/completions",
        content=parts(),
        headers={"Content-Type": "application/json", **KEY},
    )
    assert response.status_code == 413
    assert "300,000 bytes" in message(response)


def test_small_limits_hold(tight: Process) -> None:
    small = data_url(png(40, 40))
    for change, expected in (
        ({"messages": asking(data_url(png(1200, 900)))}, "1200x900 pixels"),
        ({"messages": asking(small, small, small)}, "3 images, at most 2"),
        ({"messages": [{"role": "user", "content": "?" * 310}]}, "at most 300 are accepted"),
        ({"messages": asking(), "n": 3}, "at most 2 answers"),
    ):
        response = post(tight, {"max_tokens": 2, **change}, KEY)
        assert response.status_code == 400, response.text
        assert expected in message(response)


# The tiny model writes this for as long as it may.
LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "?"}],
    "max_tokens": 300,
    "regex": "(a|b)*c{400}",
}


def test_a_full_queue_is_429_and_says_when_to_come_back(tight: Process) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: post(tight, LONG, KEY), range(8)))
    statuses = sorted(response.status_code for response in found)
    assert set(statuses) == {200, 429}
    refused = next(response for response in found if response.status_code == 429)
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert any(why in message(refused) for why in ("running", "displaced"))
    with tight.client("secret") as client:
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=2
        )
    assert made.choices[0].finish_reason in ("stop", "length")


def test_a_deadline_ends_a_request(tight: Process) -> None:
    response = post(tight, {**LONG, "deadline": 0.001}, KEY)
    assert response.status_code == 504
    assert "deadline" in message(response)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("chat/completions", {**LONG, "n": 2}),
        ("completions", {"prompt": "?", "max_tokens": 300, "regex": LONG["regex"], "n": 2}),
        ("responses", {"input": "?", "max_output_tokens": 300, "regex": LONG["regex"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_client_that_goes_away_stops_its_work(
    tight: Process, route: str, asked: dict[str, Any], stream: bool
) -> None:
    before = tight.metric("answers_abandoned_total", "secret")
    body = json.dumps({**asked, "stream": stream}).encode()
    host, port = tight.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v1/{route} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n".encode()
            + b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        tight.until(lambda: tight.metric("running", "secret") >= 1)
    tight.until(lambda: tight.metric("answers_abandoned_total", "secret") > before)
    tight.until(lambda: not tight.metric("running", "secret") + tight.metric("queued", "secret"))
    assert tight.metric("answers_abandoned_total", "secret") - before >= 1


class Local(BaseHTTPRequestHandler):
    """A neighbour that must not be reached."""

    reached = 0

    def do_GET(self) -> None:
        type(self).reached += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_private_addresses_are_never_fetched_from() -> None:
    neighbour = HTTPServer(("127.0.0.1", 0), Local)
    threading.Thread(target=neighbour.serve_forever, daemon=True).start()
    port = neighbour.server_address[1]
    hosts = [
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "2130706433",
        "0x7f.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "10.0.0.1",
        "169.254.169.254",
        "[fe80::1]",
        "224.0.0.1",
        "no-such-host.invalid",
    ]
    with serving("--allow-remote-images", "--remote-seconds", "3") as server:
        for host in hosts:
            body = {"messages": asking(f"http://{host}:{port}/a.png"), "max_tokens": 2}
            response = post(server, body)
            assert response.status_code == 400, host
            assert "public address" in message(response) or "resolved" in message(response), host
        for url in ("http://user:pass@example.com/", "http://", "http://[", "http://a:99999/"):
            assert post(server, {"messages": asking(url)}).status_code == 400, url
    neighbour.shutdown()
    assert Local.reached == 0
