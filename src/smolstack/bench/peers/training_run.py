"""A short training run of one contender: seconds per step in each epoch, and peak memory.

The run takes place once per round in a separate process; the cases of a stage share its results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from smolstack.bench.timing import Contender, ReportedValue
from smolstack.bench.worker import Worker

FIRST, LATER, MEMORY = "first", "later", "memory"
BATCH = 8


@dataclass(frozen=True)
class TrainingTask:
    """The training task of all contenders.

    Attributes:
        stage: "connector" or "lora".
        rows: an image file, its question and its answer each: ``steps`` batches of BATCH.
        steps: steps of an epoch.
    """

    stage: str
    rows: list[dict[str, str]]
    steps: int


class TrainingRun:
    """A contender's runs; each result is kept until every case has used it.

    Args:
        name, precision, form: the contender's.
        prepare: see Worker.
        threads: OpenMP threads of the process.
        arguments: of ``prepare``; its work returns the seconds of every step, by epoch.
    """

    def __init__(
        self, name: str, precision: str, form: str, prepare: str, threads: int, **arguments: Any
    ) -> None:
        self.name, self.precision, self.form = name, precision, form
        self.prepare, self.threads, self.arguments = prepare, threads, arguments
        self._waiting: dict[str, list[float]] = {FIRST: [], LATER: [], MEMORY: []}

    def contender(self, what: str) -> Contender:
        """The contender of one case: FIRST, LATER or MEMORY. A warm-up would be a whole run."""
        run = partial(self._next, what)
        return Contender(self.name, run, self.precision, self.form, warm=lambda: None)

    def _next(self, what: str) -> ReportedValue:
        if not self._waiting[what]:
            self._measure()
        return ReportedValue(self._waiting[what].pop(0))

    def _measure(self) -> None:
        with Worker(self.prepare, self.threads, **self.arguments) as worker:
            told: Mapping[str, Any] = worker.tell()
        epochs: list[list[float]] = told["value"]
        # The middle step: the first one also prepares what the others use.
        self._waiting[FIRST].append(median(epochs[0]))
        self._waiting[LATER].append(median(epochs[-1]))
        self._waiting[MEMORY].append(float(told["peak_bytes"]))
