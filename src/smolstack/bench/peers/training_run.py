"""A short training run of one contender: seconds per step in each epoch, and peak memory.

The run takes place once per round in a separate process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from smolstack.bench.timing import Contender, ReportedValues, nothing
from smolstack.bench.worker import Worker

FIRST, LATER, MEMORY = "first epoch", "later epochs", "peak memory"
BATCH = 8


@dataclass(frozen=True)
class TrainingTask:
    """The training task of all contenders.

    Attributes:
        stage: "connector" or "lora".
        rows: an image file, its question and its answer each: ``steps`` batches of BATCH.
        steps: steps of an epoch, the first of which is the warm-up.
    """

    stage: str
    rows: list[dict[str, str]]
    steps: int

    def quantity(self, what: str) -> str:
        """Return the name of FIRST, LATER or MEMORY in the results."""
        return f"train {self.stage}, {what}"


@dataclass(frozen=True)
class TrainingRun:
    """A contender's run.

    Attributes:
        name, precision, form: the contender's.
        task: what it trains.
        prepare: see Worker.
        threads: OpenMP threads of the process.
        arguments: of ``prepare``, besides the task; its work returns the seconds of every step, by
            epoch.
    """

    name: str
    precision: str
    form: str
    task: TrainingTask
    prepare: str
    threads: int
    arguments: Mapping[str, Any]

    def contender(self) -> Contender:
        """The contender; a warm-up would be a whole run, whose first step is one already."""
        return Contender(self.name, self._measure, self.precision, self.form, warm=nothing)

    def _measure(self) -> ReportedValues:
        arguments = {"task": vars(self.task), **self.arguments}
        with Worker(self.prepare, self.threads, **arguments) as worker:
            told: Mapping[str, Any] = worker.tell()
        epochs: list[list[float]] = told["value"]
        measured = {
            # The first step also prepares what the others use.
            FIRST: median(epochs[0][1:]),
            LATER: median(epochs[-1][1:]),
            MEMORY: float(told["peak_bytes"]),
        }
        return ReportedValues({self.task.quantity(what): measured[what] for what in measured})
