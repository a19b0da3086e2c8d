"""``smolstack bench quality --model FOLDER``: quality loss per precision on a model's own
weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smolstack.cli.console import note

if TYPE_CHECKING:
    from smolstack.bench.record import Record


def measure(
    model: Path,
    dtypes: tuple[str, ...],
    *,
    also: Sequence[Path] = (),
    text: Path | None = None,
    images: Path | None = None,
    outliers: bool = False,
    rounds: int,
    only: Sequence[str] = (),
    folder: Path | None = None,
    save: Path | None = None,
) -> Record:
    """Measure text unless only images are given, and images unless only a text is given.

    Args:
        outliers: measure images a second time, with outliers added to the vision tower.
        save: a file in which the rows so far are kept.
    """
    from smolstack.bench.quality.running import (
        IMAGES,
        OUTLIERS,
        TEXT,
        Choice,
        absence,
        run_quality,
    )

    parts = []
    if text is not None or images is None:
        parts.append(TEXT)
    if images is not None or text is None:
        parts.append(IMAGES)
    if outliers:
        parts.append(OUTLIERS)
    choice = Choice(model, dtypes, also, text, images, parts, rounds, only, folder)
    sentence = absence(choice)
    if sentence is not None:
        note(sentence)
    return run_quality(choice, _progress, note, save)


@contextmanager
def _progress(what: str, steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar if stderr is a terminal, otherwise print a line."""
    if not sys.stderr.isatty():
        note(f"{what} …")
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(what, total=steps)
        yield lambda: shown.advance(task)
