"""The hostile client of soak.py: invalid, damaged, oversized and interrupted requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.bombs import icon, tiff
from tests.processor.test_damaged import damaged

CHAT = "/v1/chat/completions"
TYPE = {"Content-Type": "application/json"}
# The statuses with which a server may refuse a request.
REFUSED = {400, 408, 413, 429, 503}
LARGE = (8000, 5000)  # pixels of the large images
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO")
KINDS = (
    "damaged", "damaged", "damaged", "truncated image", "large image", "tiff bomb", "icon", "bomb",
    "deep json", "huge body", "half body", "disconnect", "disconnect early", "invalid", "long text",
    "schema", "regex", "unread", "animation",
)  # fmt: skip


def chat_body(
    shown: str | list[str], text: str = "What does it say?", **more: Any
) -> dict[str, Any]:
    urls = [shown] if isinstance(shown, str) else shown
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": text})
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 40, **more}


def data_url(content: bytes) -> str:
    return f"data:image/x;base64,{base64.b64encode(content).decode()}"


def encode_image(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


class Images:
    """Image files, generated before the first request.

    Attributes:
        small: an image of each supported format.
        large: images of size LARGE, in some formats.
        bombs: a PNG of 160 megapixels.
        animation: a GIF of 200 frames.
    """

    def __init__(self) -> None:
        noise = np.random.default_rng(3).integers(0, 256, (50, 80, 3), dtype=np.uint8)
        small = Image.fromarray(noise).resize((320, 200))
        large = Image.fromarray(noise).resize(LARGE, Image.Resampling.BILINEAR)
        sizes: dict[str, dict[str, Any]] = {"ICO": {"sizes": [(64, 64)]}}
        self.small = {form: encode_image(small, form, **sizes.get(form, {})) for form in FORMATS}
        self.large = {
            "JPEG": encode_image(large, "JPEG", quality=20),
            "progressive JPEG": encode_image(large, "JPEG", quality=20, progressive=True),
            "WEBP": encode_image(large, "WEBP", quality=5, method=0),
            "PNG": encode_image(large.convert("L"), "PNG", compress_level=1),
            "TIFF": encode_image(large.convert("L"), "TIFF", compression="tiff_lzw"),
            "AVIF": encode_image(large, "AVIF", quality=5, speed=10),
            "GIF": encode_image(large.convert("L"), "GIF"),
        }
        self.bomb = encode_image(Image.new("1", (20_000, 8_000)), "PNG")
        frames = [Image.new("RGB", (400, 300), (n, 2 * n % 256, 90)) for n in range(200)]
        self.animation = encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:])
        self.tiff_bombs = [tiff(16, 30_000), tiff(500, 1500), tiff(3000, 6000)]
        self.icons = [icon(13_000), icon(1000)]


class HostileClient:
    """A client that sends hostile requests of random kinds.

    Args:
        count: number of outcomes by kind; those that must not occur begin with UNEXPECTED.
    """

    def __init__(self, client: httpx.AsyncClient, images: Images, count: Counter[str]) -> None:
        self.client, self.images, self.count = client, images, count

    async def send(self) -> None:
        """Send one request of a random kind and count its outcome."""
        kind = random.choice(KINDS)
        if kind in ("half body", "disconnect", "disconnect early", "unread"):
            await self._send_raw(kind)
            self.count[kind] += 1
            return
        try:
            content, accepted = self._request(kind)
            response = await self.client.post(CHAT, content=content, headers=TYPE)
        except httpx.TransportError:
            # The server disconnects before a body that is too large has been sent completely.
            self.count[kind if kind == "huge body" else f"UNEXPECTED: {kind}, disconnected"] += 1
            return
        if response.status_code in accepted:
            self.count[kind] += 1
            self.count[f"status {response.status_code}"] += 1
        else:
            said = response.text[:150]
            self.count[f"UNEXPECTED: {kind} {response.status_code} {said}"] += 1

    def _request(self, kind: str) -> tuple[bytes, set[int]]:
        """Return a body, and the statuses that its response may have."""
        images, stream = self.images, random.random() < 0.3
        fixed: dict[str, Any] = {
            "bomb": lambda: chat_body(data_url(images.bomb)),
            "long text": lambda: chat_body([], "hello world " * 150_000),
            "schema": lambda: chat_body([], response_format=oversized_schema()),
            "invalid": lambda: {"messages": [{"role": "user"}], "n": -1},
        }
        some: dict[str, Any] = {
            "damaged": lambda: chat_body(
                [data_url(each) for each in self._damaged()], stream=stream
            ),
            "truncated image": lambda: chat_body(data_url(self._truncated()), stream=stream),
            "large image": lambda: chat_body(data_url(self._large()), stream=stream),
            "tiff bomb": lambda: chat_body([data_url(random.choice(images.tiff_bombs))] * 4),
            "icon": lambda: chat_body([data_url(random.choice(images.icons))] * 4),
            "animation": lambda: chat_body(data_url(images.animation), stream=stream),
            "regex": lambda: chat_body(
                [], regex=random_regex(), n=4, temperature=1.0, stream=stream
            ),
        }
        if kind == "deep json":
            return b'{"messages":' + b"[" * 200_000, REFUSED
        if kind == "huge body":
            return b'{"messages": "' + b"x" * (40 * 2**20), REFUSED
        if kind in fixed:
            return to_json(fixed[kind]()), REFUSED
        return to_json(some[kind]()), REFUSED | {200}

    def _damaged(self) -> list[bytes]:
        generator = np.random.default_rng(random.randrange(2**32))
        some = random.choices(list(self.images.small.values()), k=random.choice((1, 1, 4)))
        return [damaged(content, generator) for content in some]

    def _large(self) -> bytes:
        return random.choice(list(self.images.large.values()))

    def _truncated(self) -> bytes:
        whole = self._large()
        return whole[: random.randrange(len(whole) // 4, len(whole) - 100)]

    async def _send_raw(self, kind: str) -> None:
        """Send half of a request; or send a complete one and disconnect at once, after the first
        bytes of the response, or without reading it."""
        shown = data_url(random.choice(list(self.images.small.values())))
        content = to_json(chat_body(shown, stream=True, max_tokens=500, temperature=5))
        if kind == "unread":
            content = to_json(chat_body([], stream=True, max_tokens=500, temperature=5, n=4))
        host, port = self.client.base_url.host, self.client.base_url.port
        reader, writer = await asyncio.open_connection(host, port)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content[: len(content) // 2 if kind == "half body" else None])
        await writer.drain()
        if kind == "half body":
            writer.write_eof()
        elif kind == "disconnect":
            await reader.read(300)
        elif kind == "unread":
            await asyncio.sleep(2)
        writer.close()


def to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def random_regex() -> str:
    """Return a regular expression with a large automaton."""
    return f"([a-z]{{1,{random.randrange(50, 900)}}}x){{1,40}}"


def oversized_schema() -> dict[str, Any]:
    """Return a response format beyond the limits: nested too deeply, or with too many values."""
    schema: dict[str, Any] = {"enum": [f"value number {i} of many" for i in range(120_000)]}
    if random.random() < 0.5:
        schema = {"type": "string"}
        for _ in range(300):
            schema = {"type": "object", "properties": {"in": schema}}
    return {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}
