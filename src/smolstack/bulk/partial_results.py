"""The saved state of a job: an interrupted job loses no results and repeats no work.

A folder ``OUT.parts`` next to the output contains:

    settings.json                 the job's settings; written last when the job starts
    listing.parquet               its images in order (not for Parquet input)
    rows-000000000512.journal     the results of an unfinished window, a checked record per batch
    rows-000000000512.parquet     a finished window, always complete

A killed process leaves at most one incomplete record, which is removed when the job continues.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smolstack.bulk.rows import Window
from smolstack.errors import BulkError
from smolstack.output_files import atomic_file, exclusive_writer

ROW = "row"  # column with the index of the input row
_HEADER = struct.Struct("<QI")  # bytes of a record, their CRC-32
_SETTINGS, _LISTING = "settings.json", "listing.parquet"


class Journal:
    """The results of an unfinished window, in the order of their completion.

    Opening it removes a record that was left incomplete by a killed process.

    Attributes:
        done: rows of the input with results in the journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[int] = set()
        if not path.exists():
            return
        end = 0
        for place, batch in _records(path):
            end = place
            self.done.update(batch.column(ROW).to_pylist())
        if end < path.stat().st_size:
            os.truncate(path, end)

    def append(self, results: pa.RecordBatch) -> None:
        """Write the results of a batch; after this returns, they survive a killed process."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, results.schema) as writer:
            writer.write_batch(results)
        content = memoryview(sink.getvalue())
        with self.path.open("ab") as file:
            file.write(_HEADER.pack(len(content), zlib.crc32(content)))
            file.write(content)
        self.done.update(results.column(ROW).to_pylist())

    def read(self) -> list[pa.RecordBatch]:
        """Return all results."""
        return [batch for _, batch in _records(self.path)] if self.path.exists() else []


def _records(path: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the complete records of a journal, each with its end offset."""
    end = 0
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            size, checksum = _HEADER.unpack(header)
            if size > path.stat().st_size:
                return
            content = file.read(size)
            if len(content) != size or zlib.crc32(content) != checksum:
                return
            end += _HEADER.size + size
            for batch in pa.ipc.open_stream(content):
                yield end, batch


class Parts:
    """The folder of a job's saved state; its files are described in the module's docstring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder.with_name(folder.name.removesuffix(".parts"))

    @property
    def listing(self) -> Path:
        """Path of the listing of the job's images."""
        return self.folder / _LISTING

    @property
    def begun(self) -> bool:
        """Whether the folder contains a job that can be resumed."""
        return (self.folder / _SETTINGS).exists()

    def settings(self) -> dict[str, Any]:
        """Return the settings of the job in this folder."""
        path = self.folder / _SETTINGS
        try:
            settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise BulkError(
                f"{path} is damaged ({error}); start again with restart (--restart)"
            ) from error
        return settings

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the job's settings: from here on it can be resumed."""
        path = self.folder / _SETTINGS
        with atomic_file(path, synced=True) as beside:
            beside.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")

    def clear(self) -> None:
        """Make the folder, empty."""
        if self.folder.exists():
            self.remove()
        self.folder.mkdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock on the job; it is released when the process ends.

        Raises:
            BulkError: another process holds it.
        """
        with exclusive_writer(self.folder, BulkError, self.out):
            yield

    def journal(self, window: Window) -> Journal:
        """Open the journal of a window."""
        return Journal(self._path(window, "journal"))

    def is_finished(self, window: Window) -> bool:
        """Return whether every row of a window has its results."""
        return self._path(window, "parquet").exists()

    def kept(self, windows: Iterator[Window]) -> int:
        """Return the number of input rows that are done."""
        begun = {path.name for path in self.folder.iterdir()}
        count = 0
        for window in windows:
            if self._path(window, "parquet").name in begun:
                count += len(window)
            elif self._path(window, "journal").name in begun:
                count += len(self.journal(window).done)
        return count

    def finish(self, window: Window, schema: pa.Schema) -> None:
        """Sort a window's results and write them to their file.

        Raises:
            BulkError: a row has no result.
        """
        journal = self.journal(window)
        if missing := set(range(window.start, window.stop)) - journal.done:
            raise BulkError(
                f"rows {sorted(missing)[:5]} have no result; this is a bug in smolstack"
            )
        table = pa.Table.from_batches(journal.read(), schema)
        # Stable sort: the answers about an image stay in the order of the questions.
        table = table.take(pc.sort_indices(table, [(ROW, "ascending")]))
        path = self._path(window, "parquet")
        with atomic_file(path, synced=True) as beside:
            pq.write_table(table, beside)
        journal.path.unlink(missing_ok=True)

    def results(self, window: Window) -> pa.Table:
        """Return the results of a finished window."""
        return pq.read_table(self._path(window, "parquet"))

    def remove(self) -> None:
        """Remove the folder atomically: the remains of a killed removal cannot be resumed."""
        self.remove_rest()
        self.folder.rename(self._removed)
        self.remove_rest()

    def remove_rest(self) -> None:
        """Remove what a killed :meth:`remove` left."""
        shutil.rmtree(self._removed, ignore_errors=True)

    @property
    def _removed(self) -> Path:
        return self.folder.with_name(self.folder.name + "-done")

    def _path(self, window: Window, kind: str) -> Path:
        return self.folder / f"rows-{window.start:012d}.{kind}"
