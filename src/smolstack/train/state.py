"""Checkpoints of a run: complete or absent, JSON and safetensors alone.

A checkpoint is a folder ``step-0000200`` that appears by renaming, with every weight that the run
has changed so far, the optimizer's memory, and the place in stages, data and schedule. The random
state of a step is made from seed, step and process, so its place says it too.
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
    """How far a run has come.

    Attributes:
        stage: its number, from 0.
        step: steps done in that stage.
        total: steps done in all stages.
    """

    stage: int = 0
    step: int = 0
    total: int = 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read."""

    folder: Path
    place: Place
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    base: str
    examples: int

    def check(self, base: str, examples: int, data: str) -> None:
        """Whether a run with these base weights and so many examples may go on from here.

        Raises:
            TrainingError: it began with others.
        """
        if self.base != base:
            raise TrainingError(
                f"{self.folder} was trained from other weights than the recipe's model has"
            )
        if self.examples != examples:
            raise TrainingError(
                f"{data} has {examples} examples, the run began with {self.examples}"
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
        base: a digest of the weights that the run began with.
        examples: how many there are; a resumed run must find as many.

    Raises:
        TrainingError: it cannot be written; earlier checkpoints are as they were.
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
        kept = "there is none before it" if last is None else f"the last good one is {last}"
        raise TrainingError(f"checkpoint {target} cannot be written: {reason}; {kept}") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and p.is_dir())


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_state(folder: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        TrainingError: a file of it is missing or damaged.
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


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written beside the checkpoints."""
    if folder.is_dir():
        for path in folder.glob(f".{PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(path))


def _flush(path: Path) -> None:
    """Have the disk hold it before its name says so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
