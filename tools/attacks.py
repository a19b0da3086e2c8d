"""The attacks of attack.py. Runs one of them: python tools/attacks.py NAME URL SECONDS."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.bombs import icon, plain_ppm, reduced, run_length_bmp, scans, tiff

CHAT = "/v1/chat/completions"
KEY = "attacker"  # unless attack.py is given --keys, the server does not look at it
Attack = Callable[[str, float], Awaitable[None]]
ATTACKS: dict[str, Attack] = {}


def attack(work: Attack) -> Attack:
    ATTACKS[work.__name__.removesuffix("_")] = work
    return work


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def chat(images: list[str], text: str = "What does it say?", **more: Any) -> bytes:
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in images
    ]
    parts.append({"type": "text", "text": text})
    return json.dumps({"messages": [{"role": "user", "content": parts}], **more}).encode()


def photograph(number: int, form: str = "JPEG", size: tuple[int, int] = (8000, 5000)) -> bytes:
    """Return an image file of 40 megapixels with smooth colors, different for each number."""
    small = np.random.default_rng(number).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).save(buffer, form, quality=20)
    return buffer.getvalue()


def ready() -> None:
    print("ready", flush=True)


async def keep_asking(
    url: str, seconds: float, workers: int, body: Callable[[int], bytes], path: str = CHAT
) -> None:
    """Send requests from ``workers`` clients until the time is over.

    Args:
        body: makes the body of a client's requests from its number; called before the start.
    """
    bodies = [body(number) for number in range(workers)]
    ready()
    began, statuses = time.monotonic(), dict[Any, int]()
    limits = httpx.Limits(max_connections=None)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=url, timeout=120, limits=limits, trust_env=False, headers=headers
    ) as client:

        async def work(content: bytes) -> None:
            while time.monotonic() - began < seconds:
                try:
                    left = max(0.1, seconds - (time.monotonic() - began))
                    response = await asyncio.wait_for(client.post(path, content=content), left)
                    status: Any = response.status_code
                except asyncio.TimeoutError:
                    return
                except httpx.HTTPError as error:
                    status = type(error).__name__
                    await asyncio.sleep(0.05)
                if status not in statuses:
                    shown = response.text[:200] if isinstance(status, int) else ""
                    print(status, shown, file=sys.stderr, flush=True)
                statuses[status] = statuses.get(status, 0) + 1
                if status == 429:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(work(content) for content in bodies))
    print(statuses, file=sys.stderr)


async def hold(
    url: str, seconds: float, count: int, first: bytes, *, more: bytes = b"", every: float = 1.0
) -> None:
    """Hold connections open; each sends ``first``, then ``more`` about every ``every`` seconds."""
    ready()
    parts, began = urlsplit(url), time.monotonic()

    async def one() -> None:
        while time.monotonic() - began < seconds:
            try:
                _, writer = await asyncio.wait_for(
                    asyncio.open_connection(parts.hostname, parts.port), 10
                )
            except (OSError, asyncio.TimeoutError):
                await asyncio.sleep(0.2)
                continue
            try:
                writer.write(first)
                while time.monotonic() - began < seconds and not writer.is_closing():
                    await asyncio.sleep(every * random.uniform(0.5, 1.5))
                    writer.write(more)
                    await writer.drain()
            except OSError:
                pass
            finally:
                writer.close()

    await asyncio.gather(*(one() for _ in range(count)))


def head(length: int, path: str = CHAT) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


@attack
async def idle(url: str, seconds: float) -> None:
    """More silent connections than a process may open files."""
    await hold(url, seconds, 1200, b"")


@attack
async def headers(url: str, seconds: float) -> None:
    """Headers without end, sent one byte at a time."""
    await hold(url, seconds, 1200, b"POST / HTTP/1.1\r\nX: ", more=b"x")


@attack
async def slow_bodies(url: str, seconds: float) -> None:
    """Bodies without end, sent one byte at a time."""
    await hold(url, seconds, 1200, head(10**6) + b'{"messages": "', more=b"x")


@attack
async def held_bodies(url: str, seconds: float) -> None:
    """Large bodies of which all but the end is sent."""
    size = 30 * 2**20
    await hold(
        url, seconds, 40, head(size) + b'{"messages": "' + b"x" * (size - 100), more=b"x", every=5
    )


@attack
async def unread(url: str, seconds: float) -> None:
    """Clients that request large responses and never read them."""
    body = json.dumps({"prompt": "hello world " * 40_000}).encode()
    await hold(url, seconds, 100, head(len(body), "/tokenize") + body)


@attack
async def lists(url: str, seconds: float) -> None:
    """JSON of millions of empty lists."""
    body = b'{"messages": [' + b"[]," * 5_000_000 + b"[]]}"
    await keep_asking(url, seconds, 4, lambda _: body)


@attack
async def keys(url: str, seconds: float) -> None:
    """JSON objects with very many keys, in a field in which any keys are allowed."""
    inside = b",".join(b'"k%d":%d' % (i, i) for i in range(1_500_000))
    body = chat([])[:-1] + b', "metadata": {' + inside + b"}}"
    await keep_asking(url, seconds, 4, lambda _: body)


@attack
async def tiffs(url: str, seconds: float) -> None:
    body = chat([data_url(tiff(16, 30_000), "tiff")] * 4)
    await keep_asking(url, seconds, 8, lambda _: body)


@attack
async def icons(url: str, seconds: float) -> None:
    body = chat([data_url(icon(13_000), "x-icon")] * 4)
    await keep_asking(url, seconds, 8, lambda _: body)


@attack
async def repeated_scans(url: str, seconds: float) -> None:
    """JPEG files just below the size of large images, with tens of thousands of scans."""
    body = chat([data_url(scans(50_000, 2800), "jpeg")])
    await keep_asking(url, seconds, 4, lambda _: body)


@attack
async def tiff_pages(url: str, seconds: float) -> None:
    """TIFF files with very many reduced images before the page."""
    body = chat([data_url(reduced(90_000), "tiff")])
    await keep_asking(url, seconds, 4, lambda _: body)


@attack
async def plain(url: str, seconds: float) -> None:
    """Images with decoders written in Python, just below and above the limit."""
    made = [plain_ppm(51), run_length_bmp(85)]
    urls = [data_url(made[i % 2] + bytes([i]), "x") for i in range(16)]
    large = chat([data_url(plain_ppm(1500), "x")])
    await keep_asking(url, seconds, 8, lambda n: large if n == 0 else chat(urls))


@attack
async def waves(url: str, seconds: float) -> None:
    """JPEG 2000 files of noise."""
    noise = np.random.default_rng(1).integers(0, 256, (1200, 1800, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG2000")
    urls = [data_url(buffer.getvalue() + bytes([i]), "jp2") for i in range(2)]
    await keep_asking(url, seconds, 4, lambda n: chat(urls, max_tokens=n + 1))


@attack
async def messages(url: str, seconds: float) -> None:
    """Chats with as many empty messages as a body may have values."""
    one = {"role": "user", "content": ""}
    body = json.dumps({"messages": [one] * 24_000}).encode()
    await keep_asking(url, seconds, 6, lambda _: body)


@attack
async def chunked(url: str, seconds: float) -> None:
    """Chunked bodies without end, sent in chunks of one byte."""
    first = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    await hold(url, seconds, 1200, first, more=b"1\r\n \r\n")


@attack
async def halves(url: str, seconds: float) -> None:
    """Truncated images of 40 megapixels."""
    whole = photograph(0)
    body = chat([data_url(whole[: len(whole) // 2], "jpeg")])
    await keep_asking(url, seconds, 24, lambda _: body)


@cache
def _many(form: str) -> bytes:
    kind, images = form.lower(), [photograph(number, form) for number in range(4)]
    # An appended byte makes the file different, so it is not cached.
    urls = [data_url(images[i % 4] + bytes([i]), kind) for i in range(16)]
    return chat(urls, max_tokens=4)


@attack
async def images(url: str, seconds: float) -> None:
    """Sixteen images of 40 megapixels per request, three requests at a time."""
    await keep_asking(url, seconds, 3, lambda n: _many("JPEG")[:-1] + b" " * n + b"}")


@attack
async def webps(url: str, seconds: float) -> None:
    """The same in WebP, whose decoder is slow."""
    await keep_asking(url, seconds, 3, lambda n: _many("WEBP")[:-1] + b" " * n + b"}")


@attack
async def late_pngs(url: str, seconds: float) -> None:
    """PNG files with metadata after the pixels, where the orientation may be."""
    from PIL.PngImagePlugin import PngInfo

    image, info, buffer = Image.new("RGB", (8000, 5000)), PngInfo(), io.BytesIO()
    info.add_text("late", "x", zip=False)
    image.save(buffer, "PNG", compress_level=1)
    content = buffer.getvalue()
    text = b"tEXtlate\0x"
    chunk = len(text[4:]).to_bytes(4, "big") + text
    import zlib

    chunk += zlib.crc32(text).to_bytes(4, "big")
    content = content[:-12] + chunk + content[-12:]
    body = chat([data_url(content)] * 16)
    await keep_asking(url, seconds, 3, lambda _: body)


@attack
async def regexes(url: str, seconds: float) -> None:
    """Six requests at a time, each for eight answers constrained by a long regular expression."""
    pattern = "(" + "|".join(f"[a-z{i % 10}]{{{i},{i + 900}}}x" for i in range(1, 90)) + ")"
    body = chat([], regex=pattern[:1990].rpartition("|")[0] + ")", n=8, max_tokens=2000)
    await keep_asking(url, seconds, 6, lambda _: body)


@attack
async def compiling(url: str, seconds: float) -> None:
    """Sixteen regular expressions that are large when compiled."""

    def body(n: int) -> bytes:
        pattern = f"(([a-z{n}é]{{1,100}}[0-9]?){{1,90}}|(.{{0,500}}a){{1,9}}.{{{n + 300}}})"
        return chat([], regex=pattern, max_tokens=50)

    await keep_asking(url, seconds, 16, body)


@attack
async def choices(url: str, seconds: float) -> None:
    """A hundred long choices."""

    def body(n: int) -> bytes:
        texts = [f"{n} {i} " + " ".join(str(i * j) for j in range(200)) for i in range(100)]
        return chat([], choices=[text[:1000] for text in texts])

    await keep_asking(url, seconds, 2, body)


def schema(value: Any, **more: Any) -> bytes:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return chat([], response_format=wanted, **more)


@attack
async def constants(url: str, seconds: float) -> None:
    """Schemas with constants of 500 kB."""
    body = schema({"const": "x y" * 170_000}, max_tokens=500)
    await keep_asking(url, seconds, 6, lambda _: body)


@attack
async def enums(url: str, seconds: float) -> None:
    """Schemas with the maximum number of enum values."""
    body = schema({"enum": [f"value {i * i} of many" for i in range(2500)]}, max_tokens=500, n=8)
    await keep_asking(url, seconds, 6, lambda _: body)


@attack
async def properties(url: str, seconds: float) -> None:
    """Schemas whose objects refer to each other."""
    one: dict[str, Any] = {"type": "object", "properties": {}}
    for i in range(200):
        one["properties"][f"property_{i}"] = {"$ref": f"#/$defs/d{(i * 7 + 1) % 40}"}
    definitions = {f"d{i}": {"anyOf": [one, {"type": "string", "pattern": "(a|b|cd)*e{3,90}"}]}
                   for i in range(20)}  # fmt: skip
    definitions |= {f"d{i}": {"type": "string", "maxLength": 5000} for i in range(20, 40)}
    body = schema({"$defs": definitions, **one}, max_tokens=500, n=4)
    await keep_asking(url, seconds, 6, lambda _: body)


@attack
async def names(url: str, seconds: float) -> None:
    """Images at host names that are slow to resolve."""
    some = [f"http://host{i}.{'label.' * 9}example.invalid/a.png" for i in range(16)]
    await keep_asking(url, seconds, 64, lambda _: chat(some))


@attack
async def prompts(url: str, seconds: float) -> None:
    """Different prompts that fill the context."""

    def body(n: int) -> bytes:
        rng = random.Random(n)
        return chat([], "".join(rng.choices("abcdefgh ", k=1900)), max_tokens=2000)

    await keep_asking(url, seconds, 80, body)


@attack
async def answers(url: str, seconds: float) -> None:
    """The longest possible answers, eight per request, with log probabilities."""
    body = chat(
        [], "x", n=8, max_tokens=2048, temperature=50, logprobs=True, top_logprobs=20, min_p=0
    )
    await keep_asking(url, seconds, 20, lambda _: body)


@attack
async def long_answers(url: str, seconds: float) -> None:
    """More of the longest possible answers than may wait, one per request."""
    await keep_asking(url, seconds, 100, lambda _: chat([], "x", max_tokens=2048, temperature=50))


@attack
async def parts(url: str, seconds: float) -> None:
    """A message with as many empty parts as a body may have values."""
    content = [{"type": "text", "text": ""}] * 24_000
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    await keep_asking(url, seconds, 6, lambda _: body)


@attack
async def texts(url: str, seconds: float) -> None:
    """Tokenization of texts with millions of characters."""
    body = json.dumps({"prompt": "hello wörld <" * 150_000}).encode()
    await keep_asking(url, seconds, 8, lambda _: body, "/tokenize")


@attack
async def refused(url: str, seconds: float) -> None:
    """Invalid requests, sent as quickly as possible."""
    await keep_asking(url, seconds, 50, lambda _: b'{"messages": []}')


if __name__ == "__main__":
    os.nice(19)
    asyncio.run(ATTACKS[sys.argv[1]](sys.argv[2], float(sys.argv[3])))
