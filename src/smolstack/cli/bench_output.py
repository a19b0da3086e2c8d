"""The file and the progress of a running ``smolstack bench``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from smolstack.cli.console import note, status
from smolstack.output_files import atomic_file, exclusive_writer

QUIET_SECONDS = 3.0  # without a line about what runs, where stderr is no terminal


@contextmanager
def saving(path: Path) -> Iterator[Path]:
    """Yield a new file that becomes ``path``, which no other process may write meanwhile.

    If the block fails, the results that it has kept in ``path`` stay.
    """
    from smolstack.errors import ConfigError

    before = _changed(path)
    with exclusive_writer(path, ConfigError), atomic_file(path) as beside:
        try:
            yield beside
        except BaseException:
            if _changed(path) != before:
                note(f"{path} has the results so far; the same command continues")
            raise


def _changed(path: Path) -> int | None:
    """Return when a file was changed, or None if there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show what runs: in a line that changes on a terminal, otherwise a line per step, and of its
    runs at most one every few seconds.
    """
    if sys.stderr.isatty():
        with status(what) as update:
            yield lambda running: update(f"{what} {running}")
        return
    note(what)
    shown = -QUIET_SECONDS

    def tell(running: str) -> None:
        nonlocal shown
        if monotonic() - shown >= QUIET_SECONDS:
            shown = monotonic()
            note(f"{what} {running}")

    yield tell
