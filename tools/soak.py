"""Honest and hostile requests for as long as is wished: no honest answer is lost or wrong, and
memory does not grow.

Honest clients ask, whole and streamed, about images whose answers are known from ``ask``. Beside
them others send images of every format, damaged, cut off and bombs, forms, deep and huge JSON,
half requests, and go away in mid-answer (hostile.py). Every ten seconds the server's memory,
threads and open files are noted in a JSON file; at the end its slope is told.

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
from hostile import CHAT, Hostile, Images, body
from load import image_url

GOOD_IMAGES = 20
AFTER = 5  # seconds from the last answer to the last look
EVERY = 10  # seconds between two looks at the server
PATIENCE = 1200  # seconds: on a machine that may stand still, only a lost answer takes so long


async def good(client: httpx.AsyncClient, expected: dict[str, str], count: Counter[str]) -> None:
    """Ask, and compare the answer; who is told to come back does."""
    shown, stream = random.choice(list(expected)), random.random() < 0.5
    for _ in range(100):
        status, said, wait = await answered(client, body(shown, stream=stream))
        if status not in (429, 503):
            break
        count["asked to come back"] += 1
        await asyncio.sleep(wait)
    if status != 200:
        count[f"LOST: {status} {said[:100]}"] += 1
    elif said != expected[shown]:
        count[f"WRONG: {said[:50]!r} is not {expected[shown][:50]!r}"] += 1
    else:
        count["good"] += 1


async def answered(client: httpx.AsyncClient, asked: dict[str, Any]) -> tuple[int, str, float]:
    """Status, text of the answer or of the error, and seconds after which to come back."""
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


class Record:
    """What was seen of the server, and written down as it came.

    Args:
        warm_up: seconds that the slope leaves out.
    """

    def __init__(self, pid: int, path: Path | None, warm_up: float) -> None:
        self.pid, self.path, self.warm_up = pid, path, warm_up
        self.rows: list[dict[str, Any]] = []
        self.count: Counter[str] = Counter()

    def look(self, seconds: float) -> None:
        row = {"seconds": round(seconds), "rss_mib": round(resident(self.pid), 1)}
        row["threads"] = len(os.listdir(f"/proc/{self.pid}/task"))
        row["files"] = len(os.listdir(f"/proc/{self.pid}/fd"))
        self.rows.append(row)
        if self.path is not None:
            self.path.write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")

    def slope(self) -> float | None:
        """MiB an hour after the warm-up, by least squares; None while that cannot be told."""
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
    def bad(self) -> list[str]:
        return [name for name in self.count if name.startswith(("LOST", "WRONG", "UNEXPECTED"))]


async def soak(url: str, record: Record, options: argparse.Namespace) -> int:
    vlm = smolstack.load()
    shown = [image_url(number) for number in random.sample(range(1000, 10**5), GOOD_IMAGES)]
    expected = {
        each: vlm.ask(
            base64.b64decode(each.partition(",")[2]), "What does it say?", max_new_tokens=40
        ).text
        for each in shown
    }
    images, count = Images(), record.count
    clock = Awake(options.minutes * 60)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        hostile = Hostile(client, images, count)

        async def working(make: Any) -> None:
            while not clock.over:
                try:
                    await make()
                except (httpx.HTTPError, OSError) as error:
                    count[f"connection: {type(error).__name__}"] += 1

        async def watching() -> None:
            while not clock.over:
                record.look(clock.seconds)
                print(record.rows[-1], flush=True)
                await asyncio.sleep(EVERY)

        await asyncio.gather(
            clock.run(),
            watching(),
            *(working(lambda: good(client, expected, count)) for _ in range(options.honest)),
            *(working(hostile.abuse) for _ in range(options.hostile)),
        )
        for _ in range(300):
            text = (await client.get("/metrics")).text
            running = float(re.findall(r"^smolstack_running (\S+)", text, re.M)[0])
            if running == 0:
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(AFTER)
    record.look(clock.seconds)
    print(json.dumps({**record.summary(), "rows": None, "still_running": running}, indent=2))
    failed = re.findall(r'^.*status="50[0-24-9].*$', text, re.M)
    return 1 if record.bad or running or failed else 0


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read())
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--warm-up", type=float, default=0.25, help="share that the slope leaves out"
    )
    parser.add_argument("--honest", type=int, default=3, help="clients")
    parser.add_argument("--hostile", type=int, default=4, help="clients")
    parser.add_argument("--json", type=Path, help="written every ten seconds")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="of the server")
    options = parser.parse_args()
    command = [sys.executable, "-m", "smolstack.cli", "serve", "--port", "0"]
    # Caches small enough to be full within the first minutes.
    command += ["--image-cache-bytes", str(8 * 2**20), "--prefix-cache-bytes", str(8 * 2**20)]
    command += ["--deadline", str(PATIENCE), "--body-seconds", str(PATIENCE)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"at (http://\S+)", process.stderr.readline())
    assert found, "the server did not start"
    log = subprocess.Popen(
        ["tee", str(options.log)], stdin=process.stderr, stdout=subprocess.DEVNULL
    )
    record = Record(process.pid, options.json, options.warm_up * options.minutes * 60)
    try:
        code = asyncio.run(soak(found[1], record, options))
    finally:
        process.terminate()
        process.wait()
        log.wait()
    sys.exit(code or process.returncode)


if __name__ == "__main__":
    main()
