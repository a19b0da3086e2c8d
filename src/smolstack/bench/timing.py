"""Times contenders in turn, so that other load on the machine affects all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter

import torch

OURS = "smolstack"
ROUNDS = 7


def nothing(*_given: object) -> None:
    """Ignore progress reports."""


@dataclass(frozen=True)
class ReportedValue:
    """A measurement that a contender made itself, in the unit of its case: another process's
    seconds, or bytes.
    """

    value: float


@dataclass(frozen=True)
class ReportedValues:
    """Several quantities that one run of a contender measured, by the names of Case.quantities."""

    values: Mapping[str, float]


@dataclass(frozen=True)
class Contender:
    """One implementation of the work of a case.

    Attributes:
        name: OURS or a peer's name.
        run: does the work once; the first run prepares what is needed (see :func:`later`).
        precision: number format of the weights, "" if there are none.
        form: further distinction, e.g. "sdpa".
        bytes_read: bytes of weights that one run must read, 0 if not applicable.
        warm: replaces a long run in the warm-up; ``nothing``: no warm-up.
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
        usual_rounds: number of rounds unless another is requested.
        quantities: units of the quantities, by name, where a run measures several
            (ReportedValues); each of them is then a case of the results.
    """

    name: str
    contenders: Sequence[Contender]
    flops: float = 0.0
    units: int = 1
    unit: str = "s"
    rounds: int | None = None
    usual_rounds: int = ROUNDS
    quantities: Mapping[str, str] = field(default_factory=dict)

    @property
    def units_by_name(self) -> Mapping[str, str]:
        """Units by the names of the cases in the results."""
        return self.quantities or {self.name: self.unit}


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


def measure(
    case: Case,
    rounds: int | None = None,
    warmup: int = 1,
    seconds: float | None = None,
    *,
    earlier: Sequence[Result] = (),
    after: Callable[[list[Result]], object] = nothing,
    tell: Callable[[str], object] = nothing,
) -> list[Result]:
    """Run every contender ``warmup`` times, then all of them in turn, ``rounds`` times.

    Args:
        rounds: default: the case's own number.
        seconds: no further round starts once the rounds have taken this long; the first one always
            runs.
        earlier: results of an interrupted measurement of this case: its rounds are not repeated.
        after: called with the results so far after each run of a contender.
        tell: called with a description of each run before it starts.
    """
    rounds = rounds or case.usual_rounds
    rounds = min(rounds, case.rounds or rounds)
    taken = {c.label: _rounds(case, c, earlier) for c in case.contenders}
    with torch.inference_mode():
        for _ in range(warmup if case.unit == "s" else 0):
            for contender in case.contenders:
                if len(taken[contender.label]) < rounds and contender.warm is not nothing:
                    tell(f"{contender.label}, warm-up")
                    (contender.warm or contender.run)()
        began = perf_counter()
        for turn in range(rounds):
            if turn and seconds is not None and perf_counter() - began > seconds:
                break
            for contender in case.contenders:
                if len(taken[contender.label]) > turn:
                    continue
                tell(f"{contender.label}, round {turn + 1} of {rounds}")
                taken[contender.label].append(_once(case, contender.run))
                after(_results(case, taken))
    return _results(case, taken)


def _once(case: Case, run: Callable[[], object]) -> Mapping[str, float]:
    """Return what one run measured, by the names of the results."""
    began = perf_counter()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if isinstance(found, ReportedValues):
        return {name: found.values[name] for name in case.units_by_name}
    value = found.value if isinstance(found, ReportedValue) else perf_counter() - began
    return {case.name: value}


def _rounds(
    case: Case, contender: Contender, earlier: Sequence[Result]
) -> list[Mapping[str, float]]:
    """Return the rounds of an interrupted measurement in which every quantity was measured."""
    found = {
        result.case: [value * case.units for value in result.values]
        for result in earlier
        if result.contender == contender.label and result.case in case.units_by_name
    }
    if set(found) != set(case.units_by_name):
        return []
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=False)]


def _results(case: Case, taken: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Result]:
    """Return the results of all contenders that have run, quantity by quantity."""
    found = []
    ran = [contender for contender in case.contenders if taken[contender.label]]
    for name, unit in case.units_by_name.items():
        values = {c.label: [values[name] for values in taken[c.label]] for c in ran}
        medians: dict[str, float] = {}
        for contender in ran:
            if contender.name == OURS:
                medians.setdefault(contender.precision, median(values[contender.label]))
        one = replace(case, name=name, unit=unit)
        found += [_result(one, c, values[c.label], medians) for c in ran]
    return found


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
        ratios={key: middle * case.units / reference for key, reference in ours.items()},
    )
