"""The saved results of a measurement, and the inputs that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from smolstack.bench import machine
from smolstack.output_files import atomic_file

Row: TypeAlias = dict[str, Any]


@dataclass
class State:
    """Complete rows in a file: an interrupted measurement continues after them."""

    path: Path
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))

    def row(self, key: str, make: Callable[[], Row]) -> Row:
        """Return a saved row, or compute and save it."""
        if key not in self.rows:
            self.rows[key] = make()
            with atomic_file(self.path) as partial:
                partial.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        return dict(self.rows[key])


def environment() -> Iterator[str]:
    """Yield what smolstack computes with: its sources, the kernels, the threads."""
    source = Path(__file__).parents[2]  # the package's folder
    for path in sorted(source.rglob("*")):
        if path.suffix in (".py", ".c", ".h"):
            yield hashlib.sha256(path.read_bytes()).hexdigest()
    yield str(machine.describe()["kernels"])
    yield str(torch.get_num_threads())


def files(*paths: Path) -> list[str]:
    """Return names, sizes and times of files, including those in folders."""
    found = []
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            status = file.stat()
            found.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return found


def digest(parts: Iterable[str]) -> str:
    """Return a short digest of all parts."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() + b"\0")
    return made.hexdigest()[:16]
