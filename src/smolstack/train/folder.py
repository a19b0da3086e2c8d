"""A run's folder: its contents, and whether a run may start or resume in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smolstack.checkpoint.load import DTYPES
from smolstack.checkpoint.save import to_json
from smolstack.checkpoint.weights import FLOAT_TYPES, read_entries
from smolstack.errors import TrainingError
from smolstack.train.metrics import METRICS, write_text
from smolstack.train.recipe import Recipe
from smolstack.train.state import Saved, latest, read_state

RECIPE, CHECKPOINTS, MODEL, CACHE = "recipe.json", "checkpoints", "model", "cache"
# Keys that do not affect the result: a run may be resumed with other values.
FREE = (
    "output",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "evaluation",
    "cache",
    "cache_folder",
    "device",
    "data.workers",
    "data.check",
)


def claim_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> Saved | None:
    """Return the checkpoint to resume from; None for a new run. Nothing is written or removed.

    Raises:
        TrainingError: there is an earlier run and neither resume nor overwrite is set, or it had
            another recipe, or its last checkpoint cannot be read.
    """
    folder = Path(recipe.output)
    last = latest(folder / CHECKPOINTS)
    if resume and last is not None:
        _check_recipe(recipe, folder)
        return read_state(last)
    used = [name for name in (RECIPE, METRICS, MODEL, CHECKPOINTS) if (folder / name).exists()]
    if used and not (overwrite or resume):
        raise TrainingError(
            f"{folder} contains an earlier run ({', '.join(used)}); resume=True (--resume) "
            "continues it, overwrite=True (--overwrite) removes it"
        )
    return None


def last_checkpoint(recipe: Recipe) -> str:
    """Describe where the run's last checkpoint is."""
    last = latest(Path(recipe.output) / CHECKPOINTS)
    return (
        "there is no checkpoint yet" if last is None else f"the last complete checkpoint is {last}"
    )


def prepare_folder(recipe: Recipe, saved: Saved | None) -> None:
    """Prepare the run's folder for resuming from ``saved``, or for a new run: files of earlier
    runs are removed.
    """
    folder = Path(recipe.output)
    if saved is None:
        for name in (METRICS, RECIPE):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, MODEL):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    write_text(folder / RECIPE, to_json(recipe.to_dict()))


def _check_recipe(recipe: Recipe, folder: Path) -> None:
    """Check that a run is resumed with its original recipe."""
    try:
        began = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / RECIPE} cannot be read: {error}") from error
    now = json.loads(to_json(recipe.to_dict()))
    for key, old, new in _differences(began, now):
        if not any(key == free or key.startswith(free + ".") for free in FREE):
            raise TrainingError(
                f"the recipe's {key} is {new!r}, the run in {folder} was started with {old!r}"
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            inner = f"{key}.{name}" if key else name
            yield from _differences(old.get(name), new.get(name), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{key}[{number}]")
    elif old != new:
        yield key, old, new


def stored_dtype(folder: Path, wanted: str) -> torch.dtype:
    """Return the dtype in which the trained checkpoint is saved."""
    if wanted != "auto":
        return DTYPES[wanted]
    sizes: dict[str, int] = {}
    for entry in read_entries(folder).values():
        if entry.dtype in FLOAT_TYPES:  # weights next to integers, if there are any
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.elements
    most = max(sizes, key=lambda name: sizes[name])
    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[most]
