"""Exhaustive search in a table of pages: every page is compared with every query.

The table is the output of ``map_images(…, embed="retrieval")``. It is read in chunks, so it may be
larger than memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
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
    for about, pages in _pages(table):
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
    return table


def _pages(
    table: pq.ParquetFile,
) -> Iterator[tuple[list[tuple[int, Any, Any]], list[Tensor]]]:
    """Yield numbers, names and vectors of the pages without errors."""
    first = 0
    for batch in table.iter_batches(PAGES, columns=["id", "path", "embedding"]):
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
        whole = torch.tensor(numbers).view(-1, width)
        yield about, list(torch.split(whole, lengths))
