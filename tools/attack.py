"""Run attacks on smolstack serve and measure their effect on a regular client.

The client sends a request each second about an image that the server has not seen. Its time to
first token is recorded, and the server's memory before, during and after each attack. The attack
runs in a separate process at the lowest priority, to approximate attackers on other machines.

    python tools/attack.py                        # all attacks, 20 s each
    python tools/attack.py regexes idle --seconds 60 --json results.json
    python tools/attack.py idle --descriptors 64  # as under ulimit -n 64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
import attacks
from load import image_url
from soak import resident

TARGET = 2.0  # maximum time to first token of the regular client, in seconds
CLIENT_KEY = "regular-client"  # unless --keys is given, the server does not look at it


@dataclass
class ClientResults:
    """Results of the regular client during one attack.

    Attributes:
        first: times to first token, in seconds.
        failures: errors and refusals.
        memory: resident memory of the server, in MiB.
    """

    first: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def row(self, name: str) -> dict[str, Any]:
        first = sorted(self.first) or [float("nan")]
        return {
            "attack": name,
            "requests": len(self.first) + len(self.failures),
            "median": round(statistics.median(first), 2),
            "worst": round(first[-1], 2),
            "late": sum(seconds > TARGET for seconds in first),
            "failures": self.failures,
            "before": round(self.memory[0]),
            "peak": round(max(self.memory)),
            "after": round(self.memory[-1]),
        }


async def time_to_first_token(client: httpx.AsyncClient, number: int, timeout: float) -> float:
    """Return the seconds to the first token of a streamed answer; a refused request is repeated."""
    began = time.perf_counter()
    content = [
        {"type": "image_url", "image_url": {"url": image_url(number)}},
        {"type": "text", "text": "What does it say?"},
    ]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "stream": True,
    }
    while True:
        headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
        async with client.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as response:
            if response.status_code in (429, 503) and time.perf_counter() - began < timeout:
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
                continue
            if response.status_code != 200:
                text = (await response.aread()).decode()
                raise RuntimeError(f"{response.status_code} {text[:150]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if choices[0].get("delta", {}).get("content"):
                        return time.perf_counter() - began
        raise RuntimeError("the stream ended without a token")


async def regular_client(
    url: str, pid: int, seconds: float, numbers: Any, results: ClientResults
) -> None:
    """Send a request each second, each over a new connection."""
    timeout = 60.0

    async def ask() -> None:
        try:
            async with httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=False) as client:
                results.first.append(await time_to_first_token(client, next(numbers), timeout))
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            results.failures.append(f"{type(error).__name__} {error}"[:200])

    tasks, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds:
        tasks.append(asyncio.create_task(ask()))
        results.memory.append(resident(pid))
        await asyncio.sleep(1)
    await asyncio.gather(*tasks)


def measure(name: str, url: str, pid: int, options: argparse.Namespace, numbers: Any) -> Any:
    """Run one attack, or none, next to the regular client; return the row of its results."""
    results = ClientResults(memory=[resident(pid)])
    command = [sys.executable, str(Path(attacks.__file__)), name, url, str(options.seconds)]
    attacker = None
    if name != "none":
        attacker = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert attacker.stdout is not None
        attacker.stdout.readline()  # its request bodies have been generated
    asyncio.run(regular_client(url, pid, options.seconds, numbers, results))
    if attacker is not None:
        with suppress(subprocess.TimeoutExpired):
            attacker.wait(60)
        attacker.kill()
        attacker.wait()
    time.sleep(options.after)
    results.memory.append(resident(pid))
    return results.row(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "attacks", nargs="*", help=f"names: {', '.join(['none', *attacks.ATTACKS])}"
    )
    parser.add_argument("--seconds", type=float, default=20, help="duration of each attack")
    parser.add_argument(
        "--after", type=float, default=3, help="seconds until memory is measured again"
    )
    parser.add_argument("--model", default=None, help="a checkpoint folder")
    parser.add_argument("--descriptors", type=int, help="the server's limit of open files")
    parser.add_argument("--serve", default="", help="further options of smolstack serve")
    parser.add_argument(
        "--keys", action="store_true", help="two API keys: the attack's and the regular client's"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    command = [sys.executable, "-m", "smolstack.cli", "serve", "--port", "0"]
    command += ["--model", options.model] if options.model else []
    command += ["--allow-remote-images", *options.serve.split()]
    if options.keys:
        command += ["--api-key", attacks.KEY, "--api-key", CLIENT_KEY]
    descriptors = options.descriptors or min(soft, 1024)

    log = Path(f"/tmp/attack-{os.getpid()}.log")
    rows, numbers = [], iter(range(1000, 10**9))
    with log.open("w+", encoding="utf-8") as stderr:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
        process = subprocess.Popen(command, stderr=stderr)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
        try:
            found = None
            while found is None and process.poll() is None:
                time.sleep(0.2)
                found = re.search(r"at (http://\S+)", log.read_text(encoding="utf-8"))
            assert found, "the server did not start"
            time.sleep(1)
            for name in options.attacks or ["none", *attacks.ATTACKS]:
                rows.append(measure(name, found[1], process.pid, options, numbers))
                row = rows[-1]
                print(
                    f"{name:12} first token {row['median']:6.2f} s median {row['worst']:6.2f} s "
                    f"max ({row['requests']} requests, {row['late']} late, "
                    f"{len(row['failures'])} failed)  "
                    f"MiB {row['before']} before {row['peak']} peak {row['after']} after  "
                    f"log {log.stat().st_size // 1024} KiB  {' '.join(row['failures'][:1])}",
                    flush=True,
                )
                if options.json:  # kept if the remaining attacks are interrupted
                    options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
                if process.poll() is not None:
                    print(f"the server exited with status {process.returncode}")
                    break
        finally:
            process.terminate()
            process.wait()
    late = [row["attack"] for row in rows if row["late"] or row["failures"]]
    sys.exit(f"first token later than {TARGET:g} s, or failures: {', '.join(late)}" if late else 0)


if __name__ == "__main__":
    main()
