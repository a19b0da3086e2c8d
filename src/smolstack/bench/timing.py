"""Times contenders in turn, so that other load on the machine affects all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch

OURS = "smolstack"


@dataclass(frozen=True)
class ReportedValue:
    """A measurement that a contender made itself, in the unit of its case: another process's
    seconds, or bytes.
    """

    value: float


@dataclass(frozen=True)
class Contender:
    """One implementation of the work of a case.

    Attributes:
        name: OURS or a peer's name.
        run: does the work once; the first run prepares what is needed (see :func:`later`).
        precision: number format of the weights, "" if there are none.
        form: further distinction, e.g. "sdpa".
        bytes_read: bytes of weights that one run must read, 0 if not applicable.
        warm: replaces a long run in the warm-up.
    """

    name: str
    run: Callable[[], object]
    precision: str = ""
    form: str = ""
    bytes_read: float = 0.0
    warm: Callable[[], object] | None = None

    @property
    def label(self) -> str:
        """Name, precision and form in one line."""
        return " ".join(part for part in (self.name, self.precision, self.form) if part)


@dataclass(frozen=True)
class Case:
    """The same work for every contender.

    Attributes:
        name: description of the work, e.g. "connector, 17 tiles".
        contenders: smolstack's first.
        flops: floating-point operations of one run, 0 if not applicable.
        units: results are divided by this number of units of work (64 for "64 tokens").
        unit: "s" for seconds, "B" for bytes.
        rounds: maximum number of rounds, if repetition is useless (memory).
    """

    name: str
    contenders: Sequence[Contender]
    flops: float = 0.0
    units: int = 1
    unit: str = "s"
    rounds: int | None = None


@dataclass(frozen=True)
class Result:
    """The measurements of one contender, per unit of work.

    Attributes:
        values: of every round, in order; seconds or bytes according to ``unit``.
        flops, bytes_read: of one unit of work, 0 when not counted.
        ratios: this contender's median over smolstack's in each precision: above 1, smolstack
            needs less.
    """

    case: str
    contender: str
    name: str
    precision: str
    unit: str
    median: float
    fastest: float
    slowest: float
    rounds: int
    values: list[float]
    flops: float
    bytes_read: float
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.name == OURS

    @property
    def gflops(self) -> float:
        """10⁹ floating-point operations per second, 0 if not counted."""
        return self.flops / self.median / 1e9

    @property
    def gigabytes(self) -> float:
        """10⁹ bytes of weights per second, 0 if not counted."""
        return self.bytes_read / self.median / 1e9


def later(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Return a run that is made on its first call, so that models are only loaded if measured."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def measure(case: Case, rounds: int, warmup: int = 1, seconds: float | None = None) -> list[Result]:
    """Run every contender ``warmup`` times, then all of them in turn, ``rounds`` times.

    Args:
        seconds: no further round starts once the rounds have taken this long; the first one always
            runs.
    """
    rounds = min(rounds, case.rounds or rounds)
    values: dict[str, list[float]] = {contender.label: [] for contender in case.contenders}
    with torch.inference_mode():
        for _ in range(warmup if case.unit == "s" else 0):
            for contender in case.contenders:
                (contender.warm or contender.run)()
        began = perf_counter()
        for turn in range(rounds):
            if turn and seconds is not None and perf_counter() - began > seconds:
                break
            for contender in case.contenders:
                values[contender.label].append(_once(contender.run))
    medians: dict[str, float] = {}
    for contender in case.contenders:
        if contender.name == OURS:
            medians.setdefault(contender.precision, median(values[contender.label]))
    return [_result(case, c, values[c.label], medians) for c in case.contenders]


def _once(run: Callable[[], object]) -> float:
    began = perf_counter()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found.value if isinstance(found, ReportedValue) else perf_counter() - began


def _result(case: Case, contender: Contender, taken: list[float], ours: dict[str, float]) -> Result:
    values = [value / case.units for value in taken]
    middle = median(values)
    return Result(
        case=case.name,
        contender=contender.label,
        name=contender.name,
        precision=contender.precision,
        unit=case.unit,
        median=middle,
        fastest=min(values),
        slowest=max(values),
        rounds=len(values),
        values=values,
        flops=case.flops / case.units,
        bytes_read=contender.bytes_read / case.units,
        ratios={name: middle * case.units / reference for name, reference in ours.items()},
    )
