"""The output file, whose suffix selects the format: written as a temporary file, then renamed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from smolstack.errors import BulkError

_GROUP_BYTES = 64 * 2**20  # results held in memory per Parquet row group


class _Writer(Protocol):
    def write(self, table: pa.Table) -> None: ...


def check_output(out: Path, *, lists: bool) -> None:
    """Raise an error if the output cannot be written, before any work.

    Args:
        lists: whether the output has columns of lists, which CSV cannot hold.
    """
    if out.suffix not in _FORMATS:
        found = f"the suffix {out.suffix!r}" if out.suffix else "no suffix"
        raise BulkError(f"{out} has {found}, expected one of {', '.join(_FORMATS)}")
    if lists and out.suffix == ".csv":
        raise BulkError(
            f"{out}: embeddings are lists, which CSV cannot hold; use .parquet or .jsonl"
        )
    if out.is_dir():
        raise BulkError(f"{out} is a folder, expected the name of a file")
    if not out.parent.is_dir():
        raise BulkError(f"{out}: the folder {out.parent} does not exist")


def write_output(out: Path, schema: pa.Schema, tables: Iterable[pa.Table], beside: Path) -> None:
    """Write tables to the file ``beside``, then rename it to ``out``."""
    with _FORMATS[out.suffix](beside, schema) as writer:
        for table in tables:
            writer.write(table)
    beside.replace(out)


class _Parquet:
    """Collects small tables into row groups of a suitable size."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer, self.waiting, self.bytes = writer, list[pa.Table](), 0

    def write(self, table: pa.Table) -> None:
        self.waiting.append(table)
        self.bytes += table.nbytes
        if self.bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.writer.write_table(pa.concat_tables(self.waiting))
        self.waiting, self.bytes = [], 0


class _Jsonl:
    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, table: pa.Table) -> None:
        for record in table.to_pylist():
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[_Writer]:
    with pq.ParquetWriter(path, schema) as writer:
        groups = _Parquet(writer)
        yield groups
        groups.flush()


@contextmanager
def _jsonl(path: Path, schema: pa.Schema) -> Iterator[_Writer]:
    # A lone surrogate is allowed in JSON but not in UTF-8; it must not end a long job.
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        yield _Jsonl(file)


@contextmanager
def _csv(path: Path, schema: pa.Schema) -> Iterator[_Writer]:
    with pyarrow.csv.CSVWriter(path, schema) as writer:
        yield writer


_FORMATS = {".parquet": _parquet, ".jsonl": _jsonl, ".csv": _csv}
