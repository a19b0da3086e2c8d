"""Timing contenders in turn, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

OURS = "smolstack"


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case; ``run`` does it once."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Case:
    """The same work for every contender.

    Attributes:
        name: what is done, e.g. "17 tiles, float32".
        contenders: smolstack's own first.
        flops: floating-point operations of one run, 0 when that is no measure of it.
        bytes_read: bytes of weights that one run must read, 0 likewise.
        units: results are given per this many units of work (64 for "64 tokens").
    """

    name: str
    contenders: Sequence[Contender]
    flops: float = 0.0
    bytes_read: float = 0.0
    units: int = 1


@dataclass(frozen=True)
class Result:
    """Seconds per unit of one contender's runs."""

    case: str
    contender: str
    median: float
    fastest: float
    slowest: float
    rounds: int
    gflops: float  # 10⁹ floating-point operations a second, 0 when not counted
    gigabytes: float  # 10⁹ bytes of weights a second, 0 when not counted
    ratio: float  # this contender's median over smolstack's: above 1, smolstack is faster


def measure(case: Case, rounds: int, warmup: int = 1) -> list[Result]:
    """Run every contender ``warmup`` times, then all of them in turn, ``rounds`` times."""
    times: dict[str, list[float]] = {contender.name: [] for contender in case.contenders}
    with torch.inference_mode():
        for turn in range(-warmup, rounds):
            for contender in case.contenders:
                began = perf_counter()
                contender.run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn >= 0:
                    times[contender.name].append(perf_counter() - began)
    ours = median(times[case.contenders[0].name])
    return [_result(case, name, taken, ours) for name, taken in times.items()]


def _result(case: Case, name: str, taken: list[float], ours: float) -> Result:
    middle = median(taken)
    return Result(
        case=case.name,
        contender=name,
        median=middle / case.units,
        fastest=min(taken) / case.units,
        slowest=max(taken) / case.units,
        rounds=len(taken),
        gflops=case.flops / middle / 1e9,
        gigabytes=case.bytes_read / middle / 1e9,
        ratio=middle / ours,
    )
