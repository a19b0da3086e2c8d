"""Exhaustive search in a table of pages: every page is compared with every query.

The table is the output of ``map_images(…, embed="retrieval")``. It is read in chunks, so it may be
larger than memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from smolstack.bulk.embeddings import EMBED, RETRIEVAL, SHAPE
from smolstack.errors import BulkError
from smolstack.retrieval import maxsim

PAGES = 64  # pages read at a time


@dataclass(frozen=True)
class Hit:
    """A search result.

    Attributes:
        score: MaxSim with the query (:func:`smolstack.maxsim`).
        row: the page's row number in the table.
        id, path: the page's id in the table, and the path that it was read from.
    """

    score: float
    row: int
    id: str | None
    path: str | None


def search_pages(
    index: str | Path, queries: Sequence[Tensor], *, top: int = 10, shape: str | None = None
) -> list[list[Hit]]:
    """Return the pages that match each query best.

    Args:
        index: a .parquet file of ``smolstack map --embed retrieval``.
        queries: vectors from ``vlm.embed_queries``.
        top: maximum number of pages per query.
        shape: shape of the model that embedded the queries, from ``embeddings.shape_of``; a table
            made by a model of another shape is an error.

    Returns:
        The hits of each query, best first; among equal scores, the earlier page first.

    Raises:
        BulkError: the file is not such a table.
    """
    if top < 1:
        raise BulkError(f"top is {top}, expected at least 1")
    table = _open(Path(index), shape)
    best: list[list[tuple[float, int, Hit]]] = [[] for _ in queries]
    for about, pages in _pages(table, Path(index)):
        scores = maxsim(queries, pages).tolist()
        for kept, of_query in zip(best, scores, strict=True):
            for score, (row, name, path) in zip(of_query, about, strict=True):
                entry = (score, -row, Hit(score, row, name, path))
                if len(kept) < top:
                    heapq.heappush(kept, entry)
                else:
                    heapq.heappushpop(kept, entry)
    return [[hit for _, _, hit in sorted(kept, reverse=True)] for kept in best]


def _open(index: Path, shape: str | None) -> pq.ParquetFile:
    if not index.is_file():
        raise BulkError(f"{index} is not a file, expected a table of pages")
    try:
        table = pq.ParquetFile(index)
    except (OSError, pa.ArrowInvalid) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise BulkError(f"{index} cannot be read as a Parquet file: {reason}") from None
    about = {key.decode(): value.decode() for key, value in (table.metadata.metadata or {}).items()}
    if about.get(EMBED) != RETRIEVAL:
        raise BulkError(
            f"{index} is not a table of smolstack map --embed {RETRIEVAL}, expected one (.parquet)"
        )
    if shape is not None and about.get(SHAPE) != shape:
        raise BulkError(
            f"{index} was made with a model of another shape ({about.get(SHAPE)}) than the model "
            f"for the queries ({shape})"
        )
    _check_columns(index, table.schema_arrow)
    return table


def _check_columns(index: Path, schema: pa.Schema) -> None:
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "id": ("text", _is_text),
        "path": ("text", _is_text),
        "embedding": ("lists of vectors of floats of one width", _is_vectors),
    }
    for name, (kind, suits) in expected.items():
        if schema.names.count(name) != 1:
            raise BulkError(f"{index} has {schema.names.count(name)} columns {name}, expected one")
        found = schema.field(name).type
        if not suits(found):
            raise BulkError(f"{index}: column {name} has the type {found}, expected {kind}")


def _is_text(column: pa.DataType) -> bool:
    return bool(pa.types.is_string(column) or pa.types.is_large_string(column))


def _is_vectors(column: pa.DataType) -> bool:
    lists = pa.types.is_list(column) or pa.types.is_large_list(column)
    if not lists or not pa.types.is_fixed_size_list(column.value_type):
        return False
    return bool(pa.types.is_floating(column.value_type.value_type))


def _batches(table: pq.ParquetFile, index: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from table.iter_batches(PAGES, columns=["id", "path", "embedding"])
    except (OSError, pa.ArrowException) as error:
        raise BulkError(f"{index} is damaged: {str(error).splitlines()[0]}") from None


def _pages(
    table: pq.ParquetFile, index: Path
) -> Iterator[tuple[list[tuple[int, Any, Any]], list[Tensor]]]:
    """Yield numbers, names and vectors of the pages without errors."""
    first = 0
    for batch in _batches(table, index):
        known = pc.is_valid(batch["embedding"]).to_pylist()
        names, paths = batch["id"].to_pylist(), batch["path"].to_pylist()
        about = [
            (first + index, names[index], paths[index]) for index, is_known in enumerate(known)
            if is_known
        ]  # fmt: skip
        first += len(known)
        if not about:
            continue
        vectors = batch["embedding"].drop_null()
        lengths: list[int] = pc.list_value_length(vectors).to_pylist()
        width = vectors.type.value_type.list_size
        numbers = vectors.flatten().flatten().to_numpy(zero_copy_only=False)
        pages = torch.split(torch.tensor(numbers).view(-1, width), lengths)
        for (row, _, _), page in zip(about, pages, strict=True):
            if not len(page) or not page.isfinite().all():
                what = "values that are not finite" if len(page) else "no vectors"
                raise BulkError(f"{index}: the embedding in row {row} has {what}")
        yield about, list(pages)
