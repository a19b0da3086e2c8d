"""Child processes that prepare work once and then run it on request.

Contenders whose threads or libraries conflict (two OpenMP runtimes, a spinning thread pool), and
everything whose memory is measured, run in such a process. Parent and child communicate with lines
of JSON over a pipe; output of libraries goes to stderr if the environment variable SMOLSTACK_DEBUG
is set, and is discarded otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from smolstack.bench.timing import ReportedValue


class WorkerError(RuntimeError):
    """A child process failed to prepare or do its work."""


class Worker:
    """A child process for one kind of work.

    Args:
        prepare: "module:function"; called in the child with ``arguments``, it returns the work: a
            function of keyword arguments whose result is plain data or None.
        threads: OpenMP threads of the child.
    """

    def __init__(self, prepare: str, threads: int, **arguments: Any) -> None:
        self.prepare, self.threads, self.arguments = prepare, threads, arguments
        self._process: subprocess.Popen[str] | None = None

    def run(self, **arguments: Any) -> ReportedValue:
        """Do the work once; return the seconds that it took in the child."""
        return ReportedValue(float(self.tell(**arguments)["seconds"]))

    def tell(self, **arguments: Any) -> dict[str, Any]:
        """Do the work once; return its ``seconds``, the child's ``peak_bytes`` so far, and the
        ``value``.
        """
        self.start()
        return self._ask(arguments)

    def start(self) -> None:
        """Start the child, if not started, and wait until its work is prepared."""
        if self._process is not None:
            return
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        quiet = not os.environ.get("SMOLSTACK_DEBUG")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smolstack.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env=environment,
        )
        self._ask({"prepare": self.prepare, "threads": self.threads, "arguments": self.arguments})

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            raise WorkerError(f"the process of {self.prepare} ended with exit code {code}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.prepare}: {answer['error']}")
        return answer


def peak_bytes() -> int:
    """Return the peak memory of this process so far, including mapped files."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its value for a child starts with the peak of the parent process.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Run the child: one answer per line of input."""
    # Libraries also print on stdout, some of them from C: keep the parent's pipe for our output.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work: Callable[..., Any] | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if work is None:
                work = _prepare(message)
                answer: dict[str, Any] = {"ready": True}
            else:
                began = perf_counter()
                value = work(**message)
                seconds = perf_counter() - began
                answer = {"seconds": seconds, "peak_bytes": peak_bytes(), "value": value}
        except Exception as error:  # report any exception to the parent
            answer = {"error": f"{type(error).__name__}: {error}"}
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()


def _prepare(message: Mapping[str, Any]) -> Callable[..., Any]:
    module, _, name = message["prepare"].partition(":")
    made: Callable[..., Any] = getattr(import_module(module), name)(
        threads=message["threads"], **message["arguments"]
    )
    return made


if __name__ == "__main__":
    main()
