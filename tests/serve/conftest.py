"""A real server process, started once, and the unmodified openai client."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

import smolstack

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


class Process:
    """``smolstack serve`` on a free port."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        port = () if {"--port", "--uds"} & set(arguments) else ("--port", "0")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smolstack.cli", "serve", *port, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            found = re.search(r"at ((?:https?://|unix:)\S+)", line)
            if found:
                self.url = found[1]
                break
        else:
            raise AssertionError(f"the server did not start: {said}")
        self.said: list[str] = []
        self._asking = httpx.Client(timeout=30, verify=False)  # one for all: a new one takes 50 ms
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said += list(self.process.stderr)

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        self._reader.join(10)
        self._asking.close()
        return code

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def metric(self, name: str, key: str | None = None) -> float:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        text = self._asking.get(f"{self.url}/metrics", headers=headers).text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if re.match(rf"smolstack_{name}(\{{.*\}})? ", line)
        )

    def until(self, reached: Callable[[], bool], seconds: float = 60) -> None:
        """Ask again and again until something is so."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"not so after {seconds:g} s"


@contextmanager
def serving(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Process]:
    process = Process(*arguments, environment=environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Process]:
    with serving() as process:
        yield process


@pytest.fixture(scope="session")
def tight(tiny_folder: Path) -> Iterator[Process]:
    """A server of a model that never knows when to stop, with small limits and a key."""
    with serving(
        "--model",
        str(tiny_folder),
        *("--running", "1", "--queued", "1", "--max-body-bytes", "300000"),
        *("--max-pixels", "1000000", "--max-images", "2", "--max-prompt-tokens", "300"),
        *("--max-new-tokens", "300", "--max-answers", "2", "--name", "tiny"),
        environment={"SMOLSTACK_API_KEY": "secret"},
    ) as process:
        yield process


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def data_url(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


@pytest.fixture(scope="session")
def reader() -> smolstack.VLM:
    return smolstack.load()


@pytest.fixture(scope="session")
def says(reader: smolstack.VLM) -> str:
    """What the model reads in the example image: a number of four digits."""
    return reader.ask(EXAMPLES / "number.png", "What does it say?").text


@pytest.fixture(scope="session")
def number() -> str:
    """The example image as a data URL."""
    return data_url((EXAMPLES / "number.png").read_bytes())
