"""Runs the requested parts, and combines results with those of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smolstack.bench import machine, report
from smolstack.bench.cases import PARTS
from smolstack.bench.peers import absent, implementations
from smolstack.bench.studies import STUDIES
from smolstack.bench.timing import Case, Result, measure
from smolstack.bench.workload import workload_of
from smolstack.errors import ConfigError
from smolstack.family import Preset


@dataclass(frozen=True)
class Choice:
    """What to measure, and how.

    Attributes:
        parts: keys of PARTS and STUDIES.
        dtypes: smolstack's precisions.
        rounds: alternating runs of each contender.
        seconds: time per case after which no further round starts.
        only: contenders whose label contains one of these; all if empty.
        match: cases whose name contains one of these; all if empty.
        folder: folder for the checkpoint and the peers' versions of it, for later runs.
    """

    parts: Sequence[str]
    dtypes: tuple[str, ...]
    rounds: int = 7
    seconds: float | None = None
    only: Sequence[str] = ()
    match: Sequence[str] = ()
    folder: Path | None = None


@dataclass
class Record:
    """The results of one or more runs."""

    preset: str
    machine: dict[str, Any]
    limits: dict[str, float]
    results: list[Result] = field(default_factory=list)
    studies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return {
            "preset": self.preset,
            **report.to_dict(self.results, self.studies, self.machine, self.limits),
        }

    def add(self, path: Path) -> None:
        """Insert the results of a file before these; repeated measurements of a case (or of a
        study's precision) replace the older ones.

        Raises:
            ConfigError: the file is not a record of a run.
        """
        try:
            data: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            earlier, studies = report.from_dict(data), dict(data["studies"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not a record of smolstack bench --save: {error}"
            ) from None
        anew = {result.case for result in self.results}
        self.results = [r for r in earlier if r.case not in anew] + self.results
        for name, rows in studies.items():
            own = self.studies.setdefault(name, [])
            precisions = {row.get("precision") for row in own}
            own[:0] = [row for row in rows if row.get("precision") not in precisions]
        if not self.limits:
            self.limits = dict(data["limits"])


Progress = Callable[[str], AbstractContextManager[object]]


def run(preset: Preset, choice: Choice, progress: Progress) -> Record:
    """Run all chosen measurements.

    Args:
        progress: returns a context for each step, given its description.
    """
    with progress("Measuring the machine …"):
        limits = machine.limits() if choice.parts else {}
    record = Record(preset.name, machine.describe(), limits)
    with workload_of(preset, choice.dtypes, choice.folder) as shared:
        everyone = implementations(shared)
        try:
            for part in choice.parts:
                if part in STUDIES:
                    with progress(f"Studying {part} …"):
                        record.studies.update(STUDIES[part](shared))
                    continue
                for case in _chosen(PARTS[part](shared, everyone), choice):
                    with progress(f"Measuring {case.name} …"):
                        record.results += measure(case, choice.rounds, seconds=choice.seconds)
        finally:
            for implementation in everyone:
                implementation.close()
    return record


def absences(parts: Sequence[str]) -> list[str]:
    """Return a sentence for each peer that could take part but is not installed."""
    if not any(part in PARTS for part in parts):
        return []
    return [
        f"{name} takes no part: {', '.join(packages)} not installed"
        for name, packages in absent().items()
    ]


def _chosen(cases: Iterator[Case], choice: Choice) -> Iterator[Case]:
    for case in cases:
        if choice.match and not any(text in case.name for text in choice.match):
            continue
        contenders = [
            contender
            for contender in case.contenders
            if not choice.only or any(text in contender.label for text in choice.only)
        ]
        if contenders:
            yield replace(case, contenders=contenders)
