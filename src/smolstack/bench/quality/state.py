"""What a measurement has found so far, in a file, and what its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from smolstack.bench import machine
from smolstack.bench.workload import made_once

Row: TypeAlias = dict[str, Any]


@dataclass
class State:
    """Rows that are complete, in a file: a measurement that was stopped goes on after them."""

    path: Path
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))

    def row(self, key: str, make: Callable[[], Row]) -> Row:
        """A row that was kept, or is made and kept now."""
        if key not in self.rows:
            self.rows[key] = make()
            with made_once(self.path) as partial:
                partial.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        return dict(self.rows[key])


def environment() -> Iterator[str]:
    """What smolstack computes with: its sources, the kernels, the threads."""
    source = Path(__file__).parents[2]  # the package's folder
    for path in sorted(source.rglob("*")):
        if path.suffix in (".py", ".c", ".h"):
            yield hashlib.sha256(path.read_bytes()).hexdigest()
    yield str(machine.describe()["kernels"])
    yield str(torch.get_num_threads())


def files(*paths: Path) -> list[str]:
    """Names, sizes and times of files, and of those in folders."""
    found = []
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            status = file.stat()
            found.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return found


def digest(parts: Iterable[str]) -> str:
    """A short name for all of them."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() + b"\0")
    return made.hexdigest()[:16]
