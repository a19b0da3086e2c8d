"""Runs the requested parts, and combines results with those of earlier runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smolstack.bench import machine, report
from smolstack.bench.cases import PARTS
from smolstack.bench.peers import absent, implementations
from smolstack.bench.record import Record
from smolstack.bench.studies import STUDIES, TABLES
from smolstack.bench.studies.kept import Kept
from smolstack.bench.timing import Case, Result, measure
from smolstack.bench.unfinished import Saved, read_unfinished
from smolstack.bench.workload import Workload, has_bfloat16, workload_of
from smolstack.family import Preset

DTYPES = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Choice:
    """What to measure, and how.

    Attributes:
        parts: keys of PARTS and STUDIES.
        dtypes: smolstack's precisions; default: DTYPES, without those for which the processor has
            no instructions where that takes minutes (training in bfloat16).
        rounds: alternating runs of each contender; default: the case's own number.
        seconds: time per case after which no further round starts.
        only: contenders whose label contains one of these; all if empty.
        match: cases whose name contains one of these; all if empty.
        folder: folder for the checkpoint and the peers' versions of it, for later runs.
    """

    parts: Sequence[str]
    dtypes: tuple[str, ...] = ()
    rounds: int | None = None
    seconds: float | None = None
    only: Sequence[str] = ()
    match: Sequence[str] = ()
    folder: Path | None = None

    @property
    def train_dtypes(self) -> tuple[str, ...]:
        """Precisions of the frozen tower in training."""
        return self.dtypes or tuple(d for d in DTYPES if d != "bfloat16" or has_bfloat16())

    def settings(self, preset: Preset, described: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that a continued run must have in common with the interrupted one."""
        return {
            "preset": preset.name,
            "parts": list(self.parts),
            "dtypes": list(self.dtypes),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "only": list(self.only),
            "match": list(self.match),
            "machine": dict(described),
        }


Progress = Callable[[str], AbstractContextManager[Callable[[str], object]]]


def run(
    preset: Preset,
    choice: Choice,
    progress: Progress,
    save: Path | None = None,
    note: Callable[[str], object] = lambda said: None,
) -> Record:
    """Run all chosen measurements.

    Args:
        progress: returns a context for each step, given its description; the context's function is
            called with what is running.
        save: a file in which the results are kept while the run lasts. If it holds those of an
            interrupted run with the same settings, the run continues it. Its last state is marked
            as unfinished: the caller writes the complete record.
        note: called with a message about a continued run.

    Raises:
        ConfigError: the file holds an interrupted run with other settings.
    """
    described = machine.describe()
    settings = choice.settings(preset, described)
    record = Record(preset.name, described, {}, unfinished={"settings": settings, "complete": []})
    earlier = None if save is None else read_unfinished(save, settings)
    if earlier is not None:
        record.results, record.studies = report.from_dict(earlier), earlier["studies"]
        record.limits, record.unfinished = earlier["limits"], earlier["unfinished"]
        measured = len(record.results) + sum(map(len, record.studies.values()))
        note(f"continuing the run in {save}, which has {measured} results")
    elif choice.parts:
        with progress("Measuring the machine …"):
            record.limits = machine.limits()
    dtypes = choice.dtypes or DTYPES
    with workload_of(preset, dtypes, choice.folder, choice.train_dtypes) as shared:
        everyone = implementations(shared)
        running = _Running(record, Saved(save), choice, progress)
        try:
            for part in choice.parts:
                if part in STUDIES:
                    running.study(part, shared)
                    continue
                for case in _chosen(PARTS[part](shared, everyone), choice):
                    running.case(case)
        finally:
            running.keep(now=True)
            for implementation in everyone:
                implementation.close()
    record.unfinished = None
    return record


@dataclass
class _Running:
    """A run's measurements, each kept as soon as it has been made."""

    record: Record
    saved: Saved
    choice: Choice
    progress: Progress

    def case(self, case: Case) -> None:
        """Measure a case, unless an interrupted run has completed it."""
        if case.name in self._complete:
            return
        names = set(case.units_by_name)
        earlier = [result for result in self.record.results if result.case in names]
        with self.progress(f"Measuring {case.name} …") as tell:
            measure(
                case,
                self.choice.rounds,
                seconds=self.choice.seconds,
                earlier=earlier,
                after=partial(self._replace, names),
                tell=tell,
            )
        self._finish(case.name)

    def study(self, name: str, workload: Workload) -> None:
        """Make a study, unless an interrupted run has completed it."""
        if name in self._complete:
            return
        earlier = {title: self.record.studies.get(title, []) for title in TABLES[name]}
        kept = Kept({title: rows for title, rows in earlier.items() if rows}, self._update)
        with self.progress(f"Studying {name} …"):
            STUDIES[name](workload, kept)
        self._finish(name)

    def keep(self, *, now: bool = False) -> None:
        """Write the record, if there are any results."""
        if self.record.results or self.record.studies:
            self.saved.write(self.record, now=now)

    @property
    def _complete(self) -> list[str]:
        complete: list[str] = (self.record.unfinished or {})["complete"]
        return complete

    def _replace(self, names: set[str], results: list[Result]) -> None:
        others = [result for result in self.record.results if result.case not in names]
        self.record.results = others + results
        self.keep()

    def _update(self, tables: Mapping[str, list[dict[str, Any]]]) -> None:
        self.record.studies.update(tables)
        self.keep()

    def _finish(self, name: str) -> None:
        self._complete.append(name)
        self.keep(now=True)


def absences(parts: Sequence[str], dtypes: Sequence[str] = DTYPES) -> list[str]:
    """Return a sentence for each peer that could take part but is not installed, and for a
    precision that takes no part.

    Args:
        dtypes: the requested precisions, () if none are.
    """
    if not any(part in PARTS for part in parts):
        return []
    slow = "train" in parts and not dtypes and not has_bfloat16()
    return [
        *(["bfloat16 takes no part in train: this processor computes it slowly"] if slow else ()),
        *_absent_peers(),
    ]


def _absent_peers() -> list[str]:
    return [
        f"{name} takes no part: {', '.join(packages)} not installed"
        for name, packages in absent().items()
    ]


def _chosen(cases: Iterator[Case], choice: Choice) -> Iterator[Case]:
    """Yield the chosen contenders of the chosen cases; a case of several quantities is chosen
    by its name, or by those of quantities.
    """
    for case in cases:
        quantities = case.quantities
        if not _matches(case.name, choice.match):
            quantities = {n: u for n, u in quantities.items() if _matches(n, choice.match)}
            if not quantities:
                continue
        contenders = [one for one in case.contenders if _matches(one.label, choice.only)]
        if contenders:
            yield replace(case, contenders=contenders, quantities=quantities)


def _matches(name: str, texts: Sequence[str]) -> bool:
    return not texts or any(text in name for text in texts)
