"""The results of one or more runs of ``smolstack bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolstack.bench import report
from smolstack.bench.timing import Result
from smolstack.errors import ConfigError


@dataclass
class Record:
    """The results of one or more runs.

    Attributes:
        unfinished: while the run is not finished: its settings, and the cases and studies that
            are complete.
    """

    preset: str
    machine: dict[str, Any]
    limits: dict[str, float]
    results: list[Result] = field(default_factory=list)
    studies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unfinished: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a file."""
        data = {
            "preset": self.preset,
            **report.to_dict(self.results, self.studies, self.machine, self.limits),
        }
        return data if self.unfinished is None else {**data, "unfinished": self.unfinished}

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
