"""The results of a run in its --save file while it runs, from which the next run continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from smolstack.bench.record import Record
from smolstack.errors import ConfigError
from smolstack.output_files import atomic_file

SECONDS = 2.0  # between two writes, so that they do not disturb short measurements


class Saved:
    """Writes a record to a file as it grows.

    Args:
        path: the file; None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._due = 0.0

    def write(self, record: Record, *, now: bool = False) -> None:
        """Replace the file, unless that happened less than SECONDS ago.

        Args:
            now: in any case.
        """
        if self.path is None or (not now and monotonic() < self._due):
            return
        with atomic_file(self.path) as beside:
            beside.write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
        self._due = monotonic() + SECONDS


def read_unfinished(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of an interrupted run, or None if the file holds something else.

    Args:
        settings: those of the run that is to continue.

    Raises:
        ConfigError: the interrupted run had other settings.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        unfinished = data["unfinished"]
        found = dict(unfinished["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = json.loads(json.dumps(settings))
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{path} holds an unfinished run with {name} {found.get(name)!r}, found "
                f"{wanted.get(name)!r}; expected the same options, which continue it, or the name "
                "of another file"
            )
    return dict(data)
