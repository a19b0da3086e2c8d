"""Tables of images: finds the image column and interprets its values."""

from __future__ import annotations

import base64
import binascii
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolstack.bulk.rows import Row, plain
from smolstack.errors import BulkError, ImageError
from smolstack.unique_keys import RepeatedKeyError, read_unique

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
# Recognized column names, most likely first.
IMAGE_COLUMNS = (
    "image",
    "picture",
    "path",
    "file",
    "file_name",
    "filename",
    "image_path",
    "file_path",
    "bytes",
    "image_bytes",
    "base64",
)
ID_COLUMNS = ("id", "image_id", "picture_id", "key", "uid")
_ENCODED = ("bytes", "image_bytes", "base64")  # text columns with images in base64
_MAX_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Columns:
    """The relevant columns of a table.

    Attributes:
        image: a path, bytes, base64, or a struct of bytes and path.
        id: name of the image, or None.
        error: why a row has no image, or None; only in a job's listing.
    """

    image: str
    id: str | None
    error: str | None = None


def choose_columns(
    where: str, names: Sequence[str], image: str | None, id_column: str | None
) -> Columns:
    """Return the requested columns, or those recognized by name.

    Raises:
        BulkError: there is no such column; names the file, its columns and what was expected.
    """
    found = ", ".join(repr(name) for name in names[:20]) or "none"
    for asked, option in ((image, "--image-column"), (id_column, "--id-column")):
        if asked is not None and asked not in names:
            raise BulkError(f"{where} has no column {asked!r} ({option}); its columns are {found}")
    if image is None:
        image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None and len(names) == 1:
        image = names[0]
    if image is None:
        raise BulkError(
            f"{where}: the image column is ambiguous; select it with --image-column; the columns "
            f"are {found}"
        )
    if id_column is None:
        id_column = next((name for name in ID_COLUMNS if name in names and name != image), None)
    return Columns(image, id_column)


def read_table(path: Path, columns: Columns | None, first: int = 0) -> Iterator[Row]:
    """Yield the rows of a CSV or JSONL file, numbered from ``first``."""
    if path.suffix.lower() == ".csv":
        assert columns is not None
        return _read_csv(path, columns, first)
    return _read_jsonl(path, columns, first)


def _read_jsonl(path: Path, columns: Columns | None, index: int) -> Iterator[Row]:
    """Yield rows of objects or plain strings (paths)."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            wrong = "is not a JSON object"
            try:
                value = read_unique(line.rstrip())
            except json.JSONDecodeError as reason:
                value = None
                wrong = f"is not valid JSON: {reason.msg} at column {reason.colno}"
            except RepeatedKeyError as reason:
                value = None
                wrong = f"cannot be used: {reason}"
            except RecursionError:
                value = None
                wrong = "is not valid JSON: nested too deeply"
            if isinstance(value, str):
                yield as_row(index, value, None, path.parent)
            elif isinstance(value, Mapping) and columns is not None:
                yield from_record(index, value, columns, path.parent)
            else:
                error = f"line {number} of {path.name} {wrong}"
                yield Row(index, str(index), error=error)
            index += 1


def _read_csv(path: Path, columns: Columns, first: int) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for index, record in enumerate(csv.DictReader(file), first):
            yield from_record(index, record, columns, path.parent)


def column_names(path: Path) -> list[str]:
    """Return the columns of a JSONL file (from its first object) or of a CSV file (from its
    header).
    """
    if path.suffix.lower() == ".csv":
        csv.field_size_limit(_MAX_FIELD)
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            return next(csv.reader(file), [])
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line) if line.strip() else None
            except (json.JSONDecodeError, RecursionError):
                continue
            if isinstance(value, Mapping):
                return list(value)
    return []


def from_record(index: int, record: Mapping[str, Any], columns: Columns, folder: Path) -> Row:
    """Convert a row of a table to a Row; an invalid value becomes its error."""
    given = None if columns.id is None else record.get(columns.id)
    name = None if given is None or given == "" else str(given)
    value = record.get(columns.image)
    if columns.error is not None and record.get(columns.error):
        path = value.get("path") if isinstance(value, Mapping) else None
        path = os.fsdecode(path) if isinstance(path, bytes) else None
        return Row(index, name or str(index), path=path, error=record[columns.error])
    if isinstance(value, str) and columns.image in _ENCODED:
        return as_row(index, {"bytes": value}, name, folder, encoded=columns.image)
    return as_row(index, value, name, folder)


def as_row(index: int, value: Any, name: str | None, folder: Path, encoded: str = "bytes") -> Row:
    """Convert an image value to a Row: a path (relative to ``folder``), bytes, base64, or a struct
    of ``bytes`` and ``path`` as in Hugging Face datasets. Errors call base64 ``encoded``.
    """
    path, content = value, None
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
        if isinstance(path, bytes):
            path = os.fsdecode(path)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        path, content = None, value
    is_path = isinstance(path, str) and path != "" and path[:5].lower() != "data:"
    named = path[:200] if is_path else str(index)
    name = named if name is None else name
    try:
        if isinstance(path, str) and path[:5].lower() == "data:":
            content, path, encoded = path.partition(",")[2], None, "the data URL's content"
        if isinstance(content, str):
            content = _decode(content, encoded)
    except ImageError as error:
        return Row(index, name, error=str(error))
    if content is not None:
        return Row(index, name, content=bytes(content))
    if not isinstance(path, str) or not path:
        found = "nothing" if path is None or path == "" else f"a {type(path).__name__}"
        return Row(index, name, error=f"found {found} in place of an image's path or bytes")
    if "://" in path:
        return Row(index, name, error=f"{path[:200]} is a URL; images are not downloaded")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return Row(index, name, error=f"{plain(path)!r} cannot be the name of a file")
    return Row(index, name, path=str(folder.absolute() / path))


def _decode(text: str, field: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # it may be in lines
    except (binascii.Error, ValueError) as error:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise ImageError(
            f"{field} is {shown!r}, expected an image file in base64: {error}"
        ) from None
