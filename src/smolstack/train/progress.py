"""Progress output of a run: lines and a progress bar on stderr."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Display:
    """Prints lines, and a progress bar on a terminal and in a notebook; prints nothing unless
    ``wanted``.
    """

    def __init__(self, wanted: bool) -> None:
        terminal = sys.stderr.isatty()
        self.console = Console(
            file=sys.stderr, highlight=False, quiet=not wanted, width=None if terminal else 160
        )
        terminal = terminal or self.console.is_jupyter
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (wanted and terminal),
            transient=True,
        )
        self._task: TaskID | None = None

    def say(self, *lines: str | Text) -> None:
        """Print lines above the bar."""
        for line in lines:
            self.console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True)

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """Show a new bar of ``total`` steps."""
        self.end()
        self._task = self._progress.add_task(name, total=total, completed=done, figures="")

    def advance(self, figures: str = "") -> None:
        """Advance the bar by one step."""
        if self._task is not None:
            self._progress.update(self._task, advance=1, figures=figures)

    def end(self) -> None:
        """Remove the bar."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        self._progress.stop()
