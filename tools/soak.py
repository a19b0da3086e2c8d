"""Ten minutes of good and hostile requests: no good answer is lost, and memory does not grow.

Good clients ask about images whose answers are known from ``ask``. Beside them others send
truncated images, pixel bombs, deep and huge JSON, texts and schemas that are too large, half a
request, or go away in mid-answer.

    python tools/soak.py --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

import smolstack

sys.path.insert(0, str(Path(__file__).parent))
from load import image

ABUSES = ["truncated", "bomb", "deep", "huge", "half", "vanish", "nonsense", "long", "form"]
GOOD_IMAGES = 40
PATIENCE = 1200  # seconds: on a machine that may stand still, only a lost answer takes so long


def body(shown: str, **more: Any) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": shown}},
        {"type": "text", "text": "What does it say?"},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 40, **more}


async def good(client: httpx.AsyncClient, expected: dict[str, str], count: Counter[str]) -> None:
    shown = random.choice(list(expected))
    for _ in range(100):
        response = await client.post("/v1/chat/completions", json=body(shown))
        if response.status_code != 429:
            break
        count["asked to come back"] += 1
        await asyncio.sleep(float(response.headers["Retry-After"]))
    if response.status_code != 200:
        count[f"LOST: {response.status_code} {response.text[:100]}"] += 1
    elif response.json()["choices"][0]["message"]["content"] != expected[shown]:
        count["WRONG"] += 1
    else:
        count["good"] += 1


async def hostile(client: httpx.AsyncClient, kind: str, count: Counter[str]) -> None:
    url, shown = "/v1/chat/completions", image(random.randrange(10**6))
    accepted = {400, 413, 429}
    if kind == "truncated":
        response = await client.post(url, json=body(shown[: len(shown) // 8 * 4]))
    elif kind == "bomb":
        content = io.BytesIO()
        Image.new("1", (20_000, 8_000)).save(content, "png")
        coded = base64.b64encode(content.getvalue()).decode()
        response = await client.post(url, json=body(f"data:image/png;base64,{coded}"))
    elif kind == "deep":
        response = await client.post(url, content=b'{"messages":' + b"[" * 200_000)
    elif kind == "huge":
        try:
            response = await client.post(url, content=b'{"messages": "' + b"x" * (40 * 2**20))
        except httpx.TransportError:  # the server hung up before all of it was sent
            count[kind] += 1
            return
    elif kind == "long":
        message = {"role": "user", "content": "hello world " * 150_000}
        response = await client.post(url, json={"messages": [message]})
    elif kind == "form":
        response = await client.post(url, json=body(shown, response_format=form()))
    elif kind == "nonsense":
        response = await client.post(url, json={"messages": [{"role": "user"}], "n": -1})
    else:
        await vanish(client, body(shown, stream=True, max_tokens=500, temperature=5), kind)
        count[kind] += 1
        return
    if response.status_code in accepted:
        count[kind] += 1
    else:
        count[f"UNEXPECTED: {kind} {response.status_code}"] += 1


def form() -> dict[str, Any]:
    """A schema that nobody can keep to: nested too deeply, or with too many values."""
    schema: dict[str, Any] = {"enum": [f"value number {i} of many" for i in range(120_000)]}
    if random.random() < 0.5:
        schema = {"type": "string"}
        for _ in range(300):
            schema = {"type": "object", "properties": {"in": schema}}
    return {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}


async def vanish(client: httpx.AsyncClient, request: dict[str, Any], kind: str) -> None:
    """Send half a request, or a whole one and hang up after its first bytes."""
    host, port = client.base_url.host, client.base_url.port
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(request).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content[: len(content) // 2 if kind == "half" else None])
    await writer.drain()
    if kind == "half":
        writer.write_eof()
    else:
        await reader.read(300)
    writer.close()


class Awake:
    """A clock that stands still while the machine does: asleep, or stopped for others' work."""

    def __init__(self, end: float) -> None:
        self.seconds, self.end = 0.0, end

    @property
    def over(self) -> bool:
        return self.seconds >= self.end

    async def run(self) -> None:
        while not self.over:
            began = time.monotonic()
            await asyncio.sleep(0.5)
            self.seconds += min(time.monotonic() - began, 5.0)


async def soak(url: str, pid: int, minutes: float) -> int:
    vlm = smolstack.load()
    shown = [image(number) for number in random.sample(range(1000, 10**5), GOOD_IMAGES)]
    expected = {
        each: vlm.ask(
            base64.b64decode(each.partition(",")[2]), "What does it say?", max_new_tokens=40
        ).text
        for each in shown
    }
    vlm.forget()
    count: Counter[str] = Counter()
    clock = Awake(minutes * 60)
    memory: list[tuple[float, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:

        async def working(make: Any) -> None:
            while not clock.over:
                try:
                    await make()
                except (httpx.HTTPError, OSError) as error:
                    count[f"connection: {type(error).__name__}"] += 1

        async def watching() -> None:
            while not clock.over:
                memory.append((clock.seconds, resident(pid)))
                print(
                    f"{memory[-1][0]:5.0f} s  {memory[-1][1]:6.0f} MiB  {dict(count)}", flush=True
                )
                await asyncio.sleep(30)

        await asyncio.gather(
            clock.run(),
            watching(),
            *(working(lambda: good(client, expected, count)) for _ in range(4)),
            *(working(lambda: hostile(client, random.choice(ABUSES), count)) for _ in range(3)),
        )
        for _ in range(50):
            text = (await client.get("/metrics")).text
            running = float(re.findall(r"^smolstack_running (\S+)", text, re.M)[0])
            if running == 0:
                break
            await asyncio.sleep(0.2)
    memory.append((clock.seconds, resident(pid)))
    print(json.dumps({"counts": count, "memory": memory, "still_running": running}, indent=2))
    bad = [name for name in count if name.split(":")[0] in ("LOST", "WRONG", "UNEXPECTED")]
    return 1 if bad or running or re.search(r'status="5', text) else 0


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read())
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    command = [sys.executable, "-m", "smolstack.cli", "serve", "--port", "0"]
    # Caches small enough to be full within the first minutes.
    command += ["--image-cache-bytes", str(8 * 2**20), "--prefix-cache-bytes", str(8 * 2**20)]
    command += ["--deadline", str(PATIENCE), "--body-seconds", str(PATIENCE)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"at (http://\S+)", process.stderr.readline())
    assert found, "the server did not start"
    try:
        code = asyncio.run(soak(found[1], process.pid, options.minutes))
    finally:
        process.terminate()
        print(process.stderr.read(), file=sys.stderr)
        process.wait()
    sys.exit(code or process.returncode)


if __name__ == "__main__":
    main()
