"""Progress of ``smolstack map`` on stderr: a bar on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolstack.cli.console import note

if TYPE_CHECKING:
    from smolstack.bulk import Progress

_EVERY = 30.0  # seconds between lines


@contextmanager
def progress(out: Path) -> Iterator[Any]:
    """Yield a function that shows a job's progress; after Ctrl-C, print how to continue."""
    last: list[Progress] = []
    with _bar() if sys.stderr.isatty() else _lines() as show_progress:

        def tell(progress: Progress) -> None:
            last[:] = [progress]
            show_progress(progress)

        try:
            yield tell
        except KeyboardInterrupt:
            where = last[0] if last else None
            kept = f"{where.done:,} of {where.total:,} images are done and kept; " if where else ""
            note(f"stopped: {kept}run the same command to continue (output: {out})")
            raise


class Lines:
    """Progress for logs: images done, rate, time left.

    Args:
        say: called with a line.
        clock: returns seconds.
        every: seconds between two lines.
    """

    def __init__(
        self,
        say: Callable[[str], None] = note,
        clock: Callable[[], float] = time.monotonic,
        every: float = _EVERY,
    ) -> None:
        self.say, self.clock, self.every = say, clock, every
        self._began = self._said = 0.0

    def __call__(self, progress: Progress) -> None:
        now = self.clock()
        done = progress.done - progress.kept  # without images of earlier runs, for the rate
        if not done:
            self._began = self._said = now
        elif now - self._said >= self.every:
            self._said = now
            rate = done / (now - self._began)
            left = duration((progress.total - progress.done) / rate)
            self.say(
                f"{progress.done:,} of {progress.total:,} images, {rate_text(rate)}, {left} left"
            )


def rate_text(rate: float) -> str:
    """Format images per second, or per minute for low rates."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def _lines() -> Iterator[Any]:
    yield Lines()


@contextmanager
def _bar() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("… /s" if speed is None else rate_text(speed))

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(file=sys.stderr), transient=True, speed_estimate_period=300
    ) as bar:
        task = bar.add_task("Loading …", total=None)

        def tell(progress: Any) -> None:
            if progress.done == progress.kept:
                # Images of earlier runs are not included in the rate.
                bar.reset(task, description="Images", total=progress.total, completed=progress.done)
            bar.update(task, completed=progress.done)

        yield tell
