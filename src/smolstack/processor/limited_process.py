"""Run a decoder on an untrusted file in a process of its own, with limited time and memory.

The parent writes a JSON line and the file to standard input; the child answers with a JSON line,
which may be followed by pixels. The child handles one file and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolstack.errors import ImageError

EXTRA_BYTES = 256 * 2**20  # beyond the memory that the work was estimated to take
_WALL = 6  # times the processor time, on a machine that is busy with other work


class ProcessFailedError(ImageError):
    """The process could not be started, or ended with an error of its own, not by a limit."""


def call(
    module: str, order: dict[str, Any], content: bytes, *, name: str, seconds: int, memory: int
) -> tuple[dict[str, Any], bytes]:
    """Let a module's process work on a file (see :func:`answer_call`); return its answer.

    Args:
        name: of the file, for errors.
        seconds: limit of processor time.
        memory: limit of the bytes that are allocated in addition to the file.

    Raises:
        ImageError: from the process, or a limit was exceeded.
        ProcessFailedError: the process could not be started, or failed.
    """
    line = json.dumps(order | {"memory": memory, "seconds": seconds}).encode() + b"\n"
    command = [sys.executable, "-m", module]
    wall = _WALL * seconds
    # The same smolstack, also if a program has found it by changing sys.path.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    try:
        ended = subprocess.run(
            command,
            input=line + content,
            capture_output=True,
            timeout=wall,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        head, _, pixels = ended.stdout.partition(b"\n")
    except subprocess.TimeoutExpired:
        head = b""
    except OSError as error:
        raise ProcessFailedError(
            f"{name} cannot be read: {sys.executable} cannot be started ({error.strerror})"
        ) from None
    else:
        last = (ended.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
        if not head and ended.returncode > 0 and not last.startswith("MemoryError"):
            raise ProcessFailedError(
                f"{name} cannot be read: its process failed ({last[:200] or ended.returncode})"
            )
    if not head:  # ended by the system, by a limit or by a fault in the decoder
        raise ImageError(
            f"{name} cannot be read within {seconds} s of processor time and "
            f"{memory // 2**20} MiB of memory"
        )
    answer: dict[str, Any] = json.loads(head)
    if "error" in answer:
        raise ImageError(answer["error"])
    return answer, pixels


def answer_call(work: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> None:
    """In the process: read the order and the file, and write what ``work`` returns for them."""
    order = json.loads(sys.stdin.buffer.readline())
    content = sys.stdin.buffer.read()
    _limit(order["memory"] + 2 * len(content), order["seconds"])
    try:
        answer, pixels = work(order, content)
    except ImageError as error:
        answer, pixels = {"error": str(error)}, b""
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pixels)


def _limit(memory: int, seconds: int) -> None:
    """Limit this process's processor time, and the memory that it allocates from now on."""
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout is the only limit
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # macOS, where the limit of address space has no effect either
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
