"""Output of all commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 160  # columns of tables written to a file or pipe, where lines are not wrapped
_NUMBERS = re.compile(r"\[\n([-+.\deE,\s]+)\n\s*\]")  # a list of numbers, one per line
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(*parts: RenderableType) -> None:
    """Print tables and texts on stdout, in color only on a terminal."""
    console = _console(sys.stdout)
    with console.capture() as capture:
        for part in parts:
            line = Text(visible(part)) if isinstance(part, str) else part
            if isinstance(line, Table) and line.show_header and not _fits(console, line):
                line = _one_below_another(line)
            console.print(line, soft_wrap=isinstance(line, Text))
    # Remove the padding of tables, which is useless in a file.
    lines = capture.get().split("\n")
    sys.stdout.write("\n".join(line.rstrip(" ") for line in lines))


def show_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one JSON value, and nothing else, on stdout."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    sys.stdout.write(text + "\n")


def note(message: str) -> None:
    """Print one line on stderr."""
    _console(sys.stderr).print(
        Text(visible(message).replace("\n", "\\n"), style="dim"), soft_wrap=True
    )


def error(message: str) -> None:
    """Print one error message on stderr."""
    line = Text("error: ", style="bold red")
    line.append(visible(" ".join(message.split())), style="not bold default")
    _console(sys.stderr).print(line, soft_wrap=True)


@contextmanager
def progress(message: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a spinner on stderr during a long operation, if stderr is a terminal.

    Yields a function that displays the amount done and the total.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, count: None
        return
    with _console(sys.stderr).status(message) as status:
        yield lambda what, done, count: status.update(f"{message} {what}, {done} of {count}")


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr, a terminal; yields a function that replaces the message."""
    with _console(sys.stderr).status(message) as shown:
        yield shown.update


def write_piece(piece: str) -> None:
    """Print part of an answer on stdout and flush; control characters are removed on a terminal."""
    sys.stdout.write(_CONTROL.sub("", piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def visible(text: str) -> str:
    """Escape what file names may contain: control characters, which could write anything on a
    terminal, and bytes that are not UTF-8.
    """
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class LogNotes(logging.Handler):
    """Prints log records as notes, where no other handler is set up."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def debugging() -> bool:
    """Return whether errors are shown with their traceback."""
    return os.environ.get("SMOLSTACK_DEBUG", "").lower() not in ("", "0", "false", "no")


def pairs(rows: Sequence[tuple[str, str]], title: str | None = None) -> Table:
    """Return a table of names and values, one pair per line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    if title is not None:
        table.add_row(Text(title, style="bold not italic default"), "")
    for name, value in rows:
        table.add_row(Text(f"  {name}" if title else name), Text(visible(value)))
    return table


def count(number: int) -> str:
    """Format a number with thousands separators."""
    return f"{number:,}"


def _fits(console: Console, table: Table) -> bool:
    """Return whether every cell of a table fits into a line."""
    options = console.options.update(width=10_000)
    return Measurement.get(console, options, table).maximum <= console.width


def _one_below_another(table: Table) -> Table:
    """Convert a table that is too wide for the terminal: each row as a list of its columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    headers = [column.header for column in table.columns]
    for row, cells in zip(
        table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True
    ):
        if grid.row_count:
            grid.add_row("", "")
        for number, (header, cell) in enumerate(zip(headers, cells, strict=True)):
            grid.add_row(header, cell, style=table.columns[0].style if number == 0 else row.style)
    return grid


def _console(file: Any) -> Console:
    if file.isatty():
        return Console(file=file, highlight=False)
    return Console(file=file, highlight=False, width=PIPED_WIDTH)
