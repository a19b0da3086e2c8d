"""Random access to the input by windows, through Parquet files.

A folder, a glob, a CSV or JSONL file is listed once when a job starts, so that a resumed job sees
the same rows even if the folder has changed. Parquet files are read directly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from smolstack.bulk.inputs import ParquetFiles
from smolstack.bulk.rows import Row, Window, plain
from smolstack.bulk.tables import Columns, from_record

_IMAGE, _ID, _ERROR = "image", "id", "error"
_SCHEMA = pa.schema(
    [
        (_IMAGE, pa.struct([("bytes", pa.large_binary()), ("path", pa.binary())])),
        (_ID, pa.string()),
        (_ERROR, pa.string()),
    ]
)
_ROWS_AT_ONCE = 16  # rows held while reading a file that contains images


def write_listing(path: Path, rows: Iterator[Row], window: int) -> int:
    """Write the rows of an input, one row group per window; return the number of rows."""
    count = 0
    # Paths are stored as bytes: file names are not necessarily valid text.
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        while some := list(islice(rows, window)):
            data = [
                {
                    _IMAGE: {
                        "bytes": row.content,
                        "path": None if row.path is None else os.fsencode(row.path),
                    },
                    _ID: plain(row.id),
                    _ERROR: row.error,
                }
                for row in some
            ]
            writer.write_table(pa.Table.from_pylist(data, schema=_SCHEMA), row_group_size=window)
            count += len(some)
    return count


def listed(path: Path) -> ParquetFiles:
    """Return a listing as Parquet files."""
    return ParquetFiles((path,), Columns(_IMAGE, _ID, _ERROR))


@dataclass
class _Group:
    """A row group: its file, its index in the file, and its rows of the input."""

    file: Path
    number: int
    rows: Window


class RowReader:
    """Reads rows of Parquet files by index.

    Reading the window after the previous one continues where it ended; any other window starts at
    the row group that contains its first row.
    """

    def __init__(self, source: ParquetFiles) -> None:
        self.source = source
        self.groups: list[_Group] = []
        start = 0
        for file in source.files:
            with pq.ParquetFile(file) as opened:
                for number in range(opened.num_row_groups):
                    stop = start + opened.metadata.row_group(number).num_rows
                    self.groups.append(_Group(file, number, Window(start, stop)))
                    start = stop
        self.rows = start
        self._place, self._stream = 0, self._read(0)

    def __len__(self) -> int:
        return self.rows

    def read(self, window: Window) -> Iterator[Row]:
        """Yield the rows of a window, in order."""
        here = next((g for g in self.groups if window.start < g.rows.stop), None)
        near = here is not None and self._place >= here.rows.start
        if self._place > window.start or not near:
            first = 0 if here is None else here.rows.start
            self._place, self._stream = first, self._read(first)
        while self._place < window.stop:
            row = next(self._stream)
            self._place += 1
            if row.index >= window.start:
                yield row

    def _read(self, start: int) -> Iterator[Row]:
        """Yield all rows from the row group that begins at ``start``."""
        wanted = self.source.columns
        columns = [name for name in (wanted.image, wanted.id, wanted.error) if name is not None]
        index = start
        for group in self.groups:
            if group.rows.start < start:
                continue
            # Buffered, without read-ahead: a row group may hold gigabytes of images.
            with pq.ParquetFile(group.file, buffer_size=2**20, pre_buffer=False) as opened:
                batches = opened.iter_batches(
                    _ROWS_AT_ONCE, row_groups=[group.number], columns=columns, use_threads=False
                )
                for batch in batches:
                    for record in batch.to_pylist():
                        yield from_record(index, record, wanted, group.file.parent)
                        index += 1
