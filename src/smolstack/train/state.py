"""Checkpoints of a run, written atomically as JSON and safetensors.

A checkpoint is a folder ``step-0000200`` with every weight that the run has changed so far, the
optimizer state, and the position in stages, data and schedule. The random state of a step is
derived from seed, step and process, so the position determines it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolstack.checkpoint.save import atomic_folder, to_json
from smolstack.errors import TrainingError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Place:
    """The position of a run.

    Attributes:
        stage: index of the stage, from 0.
        step: steps done in that stage.
        total: steps done in all stages.
    """

    stage: int = 0
    step: int = 0
    total: int = 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint as read from disk."""

    folder: Path
    place: Place
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    base: str
    examples: int

    def check(self, base: str, examples: int, data: str) -> None:
        """Check that a run with these base weights and examples may resume from here.

        Raises:
            TrainingError: the run was started with others.
        """
        if self.base != base:
            raise TrainingError(
                f"{self.folder} was trained from base weights that differ from the recipe's model"
            )
        if self.examples != examples:
            raise TrainingError(
                f"{data} has {examples} examples, the run was started with {self.examples}"
            )


def save_state(
    folder: Path,
    place: Place,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    base: str,
    examples: int,
    keep: int,
) -> Path:
    """Write a checkpoint into ``folder`` and remove all but the last ``keep``.

    Args:
        base: digest of the base weights.
        examples: number of examples; a resumed run must have the same number.

    Raises:
        TrainingError: it cannot be written; earlier checkpoints are unchanged.
    """
    target = folder / f"{PREFIX}{place.total:07d}"
    values = {"place": asdict(place), "base": base, "examples": examples, "format": 1}
    try:
        with atomic_folder(target, overwrite=True) as temporary:
            _write(temporary / WEIGHTS, weights)
            _write(temporary / OPTIMIZER, optimizer)
            (temporary / STATE).write_text(to_json(values), encoding="utf-8")
            for path in temporary.iterdir():
                _flush(path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        last = latest(folder)
        kept = (
            "there is no earlier checkpoint"
            if last is None
            else f"the last complete checkpoint is {last}"
        )
        raise TrainingError(f"checkpoint {target} cannot be written: {reason}; {kept}") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and p.is_dir())


def latest(folder: Path) -> Path | None:
    """Return the last complete checkpoint."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_state(folder: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        TrainingError: a file is missing or damaged.
    """
    try:
        values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return Saved(
            folder,
            Place(**values["place"]),
            load_file(str(folder / WEIGHTS)),
            load_file(str(folder / OPTIMIZER)),
            values["base"],
            values["examples"],
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"checkpoint {folder} cannot be read: {error}") from error


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(path))


def _flush(path: Path) -> None:
    """Flush a file to disk before it is renamed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
