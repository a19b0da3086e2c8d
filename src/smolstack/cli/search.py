"""``smolstack search``: finds the pages of a table that match a query best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolstack.cli import model_options, options
from smolstack.cli.console import progress, show, show_json
from smolstack.cli.model_loading import load_model
from smolstack.errors import BulkError

EXAMPLES = """
**Examples**

`smolstack map scans/ --embed retrieval --embed-dtype float16 --model vidore/colSmol-256M --out pages.parquet`

`smolstack search pages.parquet "What was the profit in 2024?" --model vidore/colSmol-256M`

`smolstack search pages.parquet "invoice" "delivery note" --top 3 --json --model vidore/colSmol-256M`

The model must be the one that made the table.
"""  # noqa: E501 - a command is one line


def search(
    index: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE", help="A .parquet file of `smolstack map --embed retrieval`."
        ),
    ],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY…", help="The query; one or more.")],
    *,
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="FOLDER|HUB_ID", help="A retrieval model (ColSmol)."),
    ],
    top: Annotated[int, typer.Option(min=1, help="Maximum number of pages per query.")] = 10,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    json: options.JsonOption = False,
) -> None:
    """Find the pages of a table that match a query best.

    Every query token is matched with the most similar token of the page; a page's score is the sum
    of these similarities (MaxSim). The search is exhaustive and needs no index besides the table.
    """
    try:
        from smolstack.bulk import search_pages
        from smolstack.bulk.embeddings import shape_of
    except ImportError as error:
        raise BulkError(str(error)) from None
    vlm = load_model(model, revision, dtype, device, threads, base=base, mmproj=mmproj)
    vectors = vlm.embed_queries(queries)
    with progress(f"Searching {index} …"):
        found = search_pages(index, vectors, top=top, shape=shape_of(vlm))
    if json:
        show_json(
            [
                {"query": query, "pages": [vars(hit) for hit in hits]}
                for query, hits in zip(queries, found, strict=True)
            ]
        )
        return
    for query, hits in zip(queries, found, strict=True):
        if len(queries) > 1:
            show(query)
        for hit in hits:
            name = hit.path or hit.id or f"row {hit.row}"
            show(f"{hit.score:8.3f}  {name}".replace("\n", "\\n"))
