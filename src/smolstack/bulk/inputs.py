"""IMAGES: a folder, glob, table or list as a stream of rows, never completely in memory."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from smolstack.bulk.rows import Row
from smolstack.bulk.tables import (
    TABLE_SUFFIXES,
    Columns,
    as_row,
    choose_columns,
    column_names,
    read_table,
)
from smolstack.errors import BulkError, ImageError
from smolstack.processor import formats
from smolstack.processor.folders import SkippedFiles, search
from smolstack.processor.pages import SUFFIXES, TIFF_SUFFIXES, count_pages, page_of

ImageInputs: TypeAlias = "str | Path | Sequence[str | Path | bytes]"
# Suffixes for searching folders; globs and tables may name any file.
IMAGE_SUFFIXES = frozenset([*formats.SUFFIXES, *SUFFIXES])
_MAGIC = "*?["
_log = logging.getLogger("smolstack")


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files that are read directly."""

    files: tuple[Path, ...]
    columns: Columns


@dataclass(frozen=True)
class Input:
    """The input of a job.

    Attributes:
        identity: plain data that must be the same when the job is resumed.
        rows: returns the stream of rows; None for Parquet files, which need no listing.
        parquet: the Parquet files, or None.
    """

    identity: dict[str, Any]
    rows: Callable[[], Iterator[Row]] | None
    parquet: ParquetFiles | None = None


def open_input(
    images: ImageInputs,
    image_column: str | None = None,
    id_column: str | None = None,
    password: str | None = None,
) -> Input:
    """Check that IMAGES can be read, without listing it.

    Args:
        password: password of encrypted PDF files, whose pages are counted.

    Raises:
        BulkError: there are no images, or a table has no column of images.
    """
    if not isinstance(images, (str, Path)):
        return _from_list(images, password)
    path = Path(images)
    if path.is_dir():
        _no_columns(image_column, id_column, f"{path} is a folder")
        return Input({"images": str(path.absolute())}, lambda: walk(path, password))
    if path.is_file():
        files = [path]
    elif any(sign in str(images) for sign in _MAGIC):
        files = sorted(Path(name) for name in glob.iglob(str(images), recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise BulkError(f"{images}: no file matches, expected images or tables of images")
    else:
        raise BulkError(
            f"{images}: found nothing, expected a folder, a glob, an image, or a table of "
            f"images ({', '.join(TABLE_SUFFIXES)})"
        )
    kinds = {file.suffix.lower() if file.suffix.lower() in TABLE_SUFFIXES else "" for file in files}
    if kinds == {""}:
        _no_columns(image_column, id_column, f"{images} names images")
        return Input({"images": str(Path(images).absolute())}, lambda: _named(files, password))
    if len(kinds) > 1:
        raise BulkError(
            f"{images} matches files of several kinds ({', '.join(sorted(kinds - {''}))} among "
            "them), expected tables of one kind or images"
        )
    return _from_tables(files, kinds.pop(), image_column, id_column)


def walk(folder: Path, password: str | None = None) -> Iterator[Row]:
    """Yield the images of a folder and its subfolders in the order of their names.

    Hidden files and folders are ignored. Other skipped entries (files of other kinds, broken links,
    links to folders) are counted and reported in a warning at the end.
    """
    root, over = folder.absolute(), SkippedFiles()
    found = search(root, IMAGE_SUFFIXES, over)
    names = ((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in found)
    yield from _rows(names, password)
    if over:
        _log.warning("%s", over.sentence(folder))


def _rows(files: Iterable[tuple[str, str]], password: str | None) -> Iterator[Row]:
    """Yield a row per image of the given (name, path) pairs, and per page of files with pages."""
    index = 0
    for name, path in files:
        for row in _pages(index, name, path, password):
            yield row
            index += 1


def _pages(index: int, name: str, path: str, password: str | None) -> Iterator[Row]:
    page, suffix = page_of(path), Path(path).suffix.lower()
    if (page is not None and page.number is not None) or suffix not in SUFFIXES:
        yield Row(index, name, path=path)
        return
    try:
        count = count_pages(Path(path), password)
    except ImageError as error:
        yield Row(index, name, path=path, error=str(error))
        return
    if count == 1 and suffix in TIFF_SUFFIXES:
        yield Row(index, name, path=path)
        return
    for number in range(1, count + 1):
        yield Row(index + number - 1, f"{name}#page={number}", path=f"{path}#page={number}")


def _named(files: Sequence[Path], password: str | None) -> Iterator[Row]:
    yield from _rows(((str(file), str(file.absolute())) for file in files), password)


def _from_list(images: Sequence[str | Path | bytes], password: str | None) -> Input:
    digest = hashlib.sha256()
    for image in images:
        if not isinstance(image, (str, Path, bytes)):
            raise BulkError(
                f"the list of images contains a {type(image).__name__}, expected paths or bytes"
            )
        content = image if isinstance(image, bytes) else str(Path(image).absolute()).encode()
        digest.update(str(len(content)).encode() + b":" + content)

    def rows() -> Iterator[Row]:
        index = 0
        for image in images:
            value = image if isinstance(image, bytes) else str(image)
            row = as_row(index, value, None, Path())
            some = [row] if row.path is None else list(_pages(index, row.id, row.path, password))
            yield from some
            index += len(some)

    identity = f"a list of {len(images)}, sha256 {digest.hexdigest()[:16]}"
    return Input({"images": identity}, rows)


def _from_tables(
    files: list[Path], kind: str, image_column: str | None, id_column: str | None
) -> Input:
    where = str(files[0])
    names = _schema(files).names if kind == ".parquet" else column_names(files[0])
    plain = kind in (".jsonl", ".ndjson") and not names  # one path per line
    if plain:
        _no_columns(image_column, id_column, f"{where} has no JSON object")
    columns = None if plain else choose_columns(where, names, image_column, id_column)
    identity = {
        "images": [str(file.absolute()) for file in files],
        "state of the tables": [[(s := file.stat()).st_size, s.st_mtime_ns] for file in files],
        "columns": None if columns is None else [columns.image, columns.id],
    }
    if kind == ".parquet":
        assert columns is not None
        return Input(identity, None, ParquetFiles(tuple(f.absolute() for f in files), columns))

    def rows() -> Iterator[Row]:
        count = 0
        for file in files:
            for row in read_table(file, columns, count):
                yield row
                count = row.index + 1

    return Input(identity, rows)


def _schema(files: list[Path]) -> pa.Schema:
    """Return the columns of the first Parquet file, after checking that all files are Parquet."""
    schemas = []
    for file in files:
        try:
            schemas.append(pq.read_schema(file))
        except pa.ArrowInvalid as error:
            raise BulkError(f"{file} cannot be read as a Parquet file: {error}") from error
    return schemas[0]


def _no_columns(image: str | None, id_column: str | None, found: str) -> None:
    for value, option in ((image, "--image-column"), (id_column, "--id-column")):
        if value is not None:
            raise BulkError(f"{option} {value!r} is for tables, and {found}")
