"""A soak test of smolstack serve: valid and hostile requests for a given time.

Valid clients send requests, streamed or not, about images whose answers are known from ``ask``; no
answer may be lost or wrong. Hostile clients (hostile_client.py) send damaged and truncated images
of all formats, decompression bombs, large schemas, deeply nested and huge JSON, incomplete
requests, and disconnect during answers. Every ten seconds, the server's memory, threads and open
files are written to a JSON file, with the slope of the memory.

    python tools/soak.py --minutes 60 --json soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

import smolstack

sys.path.insert(0, str(Path(__file__).parent))
from hostile_client import CHAT, HostileClient, Images, chat_body
from load import image_url

VALID_IMAGES = 20
SETTLE_SECONDS = 5  # seconds from the last answer to the last sample
SAMPLE_SECONDS = 10  # seconds between two samples
TIMEOUT = 1200  # seconds; long enough that only lost answers exceed it if the machine sleeps


async def ask_and_compare(
    client: httpx.AsyncClient, expected: dict[str, str], count: Counter[str]
) -> None:
    """Send a request and compare the answer; a refused request is repeated."""
    shown, stream = random.choice(list(expected)), random.random() < 0.5
    for _ in range(100):
        status, said, wait = await request_answer(client, chat_body(shown, stream=stream))
        if status not in (429, 503):
            break
        count["retried"] += 1
        await asyncio.sleep(wait)
    if status != 200:
        count[f"LOST: {status} {said[:100]}"] += 1
    elif said != expected[shown]:
        count[f"WRONG: {said[:50]!r} is not {expected[shown][:50]!r}"] += 1
    else:
        count["correct"] += 1


async def request_answer(
    client: httpx.AsyncClient, asked: dict[str, Any]
) -> tuple[int, str, float]:
    """Return the status, the text of the answer or error, and the seconds before a retry."""
    async with client.stream("POST", CHAT, json=asked) as response:
        content = await response.aread()
    wait = float(response.headers.get("Retry-After", 1))
    if response.status_code != 200:
        return response.status_code, content.decode(), wait
    if not asked["stream"]:
        return 200, json.loads(content)["choices"][0]["message"]["content"], wait
    events = [line[6:] for line in content.decode().splitlines() if line.startswith("data: {")]
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    return 200, "".join(pieces), wait


class RunClock:
    """A clock that does not count time in which the process is suspended."""

    def __init__(self, end: float) -> None:
        self.seconds, self.end = 0.0, end

    @property
    def finished(self) -> bool:
        return self.seconds >= self.end

    async def run(self) -> None:
        while not self.finished:
            began = time.monotonic()
            await asyncio.sleep(0.5)
            self.seconds += min(time.monotonic() - began, 5.0)


class Measurements:
    """Samples of the server's resources and counts of outcomes, written to a file as they arrive.

    Args:
        warm_up: initial seconds that are excluded from the slope.
    """

    def __init__(self, pid: int, path: Path | None, warm_up: float) -> None:
        self.pid, self.path, self.warm_up = pid, path, warm_up
        self.rows: list[dict[str, Any]] = []
        self.count: Counter[str] = Counter()

    def sample(self, seconds: float) -> None:
        row = {"seconds": round(seconds), "rss_mib": round(resident(self.pid), 1)}
        row["threads"] = len(os.listdir(f"/proc/{self.pid}/task"))
        row["files"] = len(os.listdir(f"/proc/{self.pid}/fd"))
        self.rows.append(row)
        if self.path is not None:
            self.path.write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")

    def slope(self) -> float | None:
        """Return MiB per hour after the warm-up, by least squares; None for under 3 samples."""
        points = [(r["seconds"], r["rss_mib"]) for r in self.rows if r["seconds"] >= self.warm_up]
        if len(points) < 3:
            return None
        x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
        spread = sum((a - x) ** 2 for a, _ in points)
        return round(3600 * sum((a - x) * (b - y) for a, b in points) / spread, 1)

    def summary(self) -> dict[str, Any]:
        return {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "requests": sum(n for name, n in self.count.items() if not name.startswith("status")),
            "warm_up_seconds": self.warm_up,
            "slope_mib_per_hour": self.slope(),
            "counts": dict(self.count.most_common()),
            "rows": self.rows,
        }

    @property
    def failures(self) -> list[str]:
        return [name for name in self.count if name.startswith(("LOST", "WRONG", "UNEXPECTED"))]


async def soak(url: str, measurements: Measurements, options: argparse.Namespace) -> int:
    vlm = smolstack.load()
    shown = [image_url(number) for number in random.sample(range(1000, 10**5), VALID_IMAGES)]
    expected = {
        each: vlm.ask(
            base64.b64decode(each.partition(",")[2]), "What does it say?", max_new_tokens=40
        ).text
        for each in shown
    }
    images, count = Images(), measurements.count
    clock = RunClock(options.minutes * 60)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
        hostile = HostileClient(client, images, count)

        async def working(make: Any) -> None:
            while not clock.finished:
                try:
                    await make()
                except (httpx.HTTPError, OSError) as error:
                    count[f"connection: {type(error).__name__}"] += 1

        async def watching() -> None:
            while not clock.finished:
                measurements.sample(clock.seconds)
                print(measurements.rows[-1], flush=True)
                await asyncio.sleep(SAMPLE_SECONDS)

        await asyncio.gather(
            clock.run(),
            watching(),
            *(
                working(lambda: ask_and_compare(client, expected, count))
                for _ in range(options.valid)
            ),
            *(working(hostile.send) for _ in range(options.hostile)),
        )
        for _ in range(300):
            text = (await client.get("/metrics")).text
            running = float(re.findall(r"^smolstack_running (\S+)", text, re.M)[0])
            if running == 0:
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(SETTLE_SECONDS)
    measurements.sample(clock.seconds)
    print(json.dumps({**measurements.summary(), "rows": None, "still_running": running}, indent=2))
    failed = re.findall(r'^.*status="50[0-24-9].*$', text, re.M)
    return 1 if measurements.failures or running or failed else 0


def resident(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read())
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--warm-up", type=float, default=0.25, help="share of the time before the slope"
    )
    parser.add_argument("--valid", type=int, default=3, help="number of valid clients")
    parser.add_argument("--hostile", type=int, default=4, help="number of hostile clients")
    parser.add_argument("--json", type=Path, help="written every ten seconds")
    parser.add_argument(
        "--log", type=Path, default=Path(os.devnull), help="file for the server's log"
    )
    options = parser.parse_args()
    command = [sys.executable, "-m", "smolstack.cli", "serve", "--port", "0"]
    # Small caches, which are full within the first minutes.
    command += ["--image-cache-bytes", str(8 * 2**20), "--prefix-cache-bytes", str(8 * 2**20)]
    command += ["--deadline", str(TIMEOUT), "--body-seconds", str(TIMEOUT)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"at (http://\S+)", process.stderr.readline())
    assert found, "the server did not start"
    log = subprocess.Popen(
        ["tee", str(options.log)], stdin=process.stderr, stdout=subprocess.DEVNULL
    )
    measurements = Measurements(process.pid, options.json, options.warm_up * options.minutes * 60)
    try:
        code = asyncio.run(soak(found[1], measurements, options))
    finally:
        process.terminate()
        process.wait()
        log.wait()
    sys.exit(code or process.returncode)


if __name__ == "__main__":
    main()
