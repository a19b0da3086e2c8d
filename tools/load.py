"""Compare throughput and latency of smolstack serve and transformers serve on one checkpoint.

Closed loop: each of N clients sends a request, reads the streamed answer and sends the next one,
about an image that the server has not seen (or the same image, with --same-image). Runs of the two
servers alternate, so that other load on the machine affects both.

    python tools/load.py                          # the bundled reader
    python tools/load.py --model FOLDER --tokens 32 --seconds 60 --json results.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw

import smolstack

# Upper bound of answers per second: enough images are generated before the measurement.
MOST_PER_SECOND = 20


@dataclass
class Run:
    """Results of one server with a number of clients; times in seconds."""

    server: str
    clients: int
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    failures: int = 0

    def row(self) -> dict[str, Any]:
        answers = len(self.whole)
        return {
            "server": self.server,
            "clients": self.clients,
            "answers": answers,
            "failures": self.failures,
            "answers_per_second": answers / self.seconds,
            **{f"first_p{p}": percentile(self.first, p) for p in (50, 95)},
            **{f"whole_p{p}": percentile(self.whole, p) for p in (50, 95, 99)},
        }


def percentile(values: list[float], p: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * p // 100)] if ordered else float("nan")


def image_url(number: int) -> str:
    """Return a small image, different for each number, as a data URL."""
    image = Image.new("RGB", (640, 400), (200 + number % 40, 190, 150 + number // 40 % 80))
    ImageDraw.Draw(image).text((80, 90), str(number), fill=(20, 30, 120), font_size=190)
    content = io.BytesIO()
    image.save(content, "png", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


async def ask(client: httpx.AsyncClient, url: str, model: str, image: str, tokens: int) -> Any:
    """Stream one answer; return the seconds to its first token and to its end."""
    began, first = time.perf_counter(), None
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "What does it say?"},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:]).get("choices") or [{}]
                if first is None and choices[0].get("delta", {}).get("content"):
                    first = time.perf_counter() - began
    whole = time.perf_counter() - began
    return (whole if first is None else first), whole


async def load(run: Run, url: str, options: argparse.Namespace, images: list[str]) -> None:
    """Run ``run.clients`` clients for ``options.seconds``; answers that have begun are completed.

    Args:
        images: images for all requests, none of them known to the server.
    """
    limits, rest = httpx.Limits(max_connections=None), iter(images)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        began = time.perf_counter()

        async def work() -> None:
            while time.perf_counter() - began < options.seconds:
                image = images[0] if options.same_image else next(rest)
                try:
                    first, whole = await ask(client, url, options.model, image, options.tokens)
                except httpx.HTTPError:
                    run.failures += 1
                    continue
                run.first.append(first)
                run.whole.append(whole)

        await asyncio.gather(*(work() for _ in range(run.clients)))
        run.seconds = time.perf_counter() - began


@contextmanager
def running_server(name: str, command: list[str], port: int) -> Iterator[tuple[str, str]]:
    """Start a server, yield its name and URL when it is ready, and stop it."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise SystemExit(
                    f"{name} exited with status {process.returncode}: {' '.join(command)}"
                )
            try:
                httpx.get(f"{url}/health", timeout=2)
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield name, url
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader = Path(smolstack.__file__).parent / "reader"
    parser.add_argument("--model", default=str(reader), help="a checkpoint folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=10, help="duration of each run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16, help="maximum tokens per answer")
    parser.add_argument("--same-image", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without transformers serve")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bin_folder, ports = Path(sys.executable).parent, (free_port(), free_port())
    model = ["--model", options.model]
    ours = [sys.executable, "-m", "smolstack.cli", "serve", *model, "--port", str(ports[0])]
    theirs = [str(bin_folder / "transformers"), "serve", options.model, "--device", "cpu"]
    theirs += ["--port", str(ports[1]), "--dtype", "float32", "--log-level", "error"]
    rows = []
    numbers = iter(range(1000, 10**9))
    with ExitStack() as stack:
        ours += ["--dtype", "float32"]
        servers = [stack.enter_context(running_server("smolstack", ours, ports[0]))]
        if not options.alone:
            servers.append(stack.enter_context(running_server("transformers", theirs, ports[1])))
        for name, url in servers:  # warm-up before any measurement
            warm = argparse.Namespace(**vars(options) | {"seconds": 0.1})
            asyncio.run(load(Run(name, 1), url, warm, [image_url(next(numbers)) for _ in range(9)]))
        for clients in options.clients:
            runs = {name: Run(name, clients) for name, _ in servers}
            for _ in range(options.rounds):
                count = clients + int(options.seconds * MOST_PER_SECOND)
                images = [image_url(next(numbers)) for _ in range(count)]
                for name, url in servers:
                    part = Run(name, clients)
                    asyncio.run(load(part, url, options, images))
                    whole = runs[name]
                    whole.seconds += part.seconds
                    whole.failures += part.failures
                    whole.first += part.first
                    whole.whole += part.whole
            rows += [run.row() for run in runs.values()]
            for row in rows[-len(servers) :]:
                print(
                    f"{row['server']:13} {clients:3} clients {row['answers_per_second']:7.2f} "
                    f"answers/s  first token {row['first_p50']:.3f} / {row['first_p95']:.3f} s  "
                    f"total {row['whole_p50']:.3f} / {row['whole_p95']:.3f} / "
                    f"{row['whole_p99']:.3f} s  ({row['answers']} answers, "
                    f"{row['failures']} failures)",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
