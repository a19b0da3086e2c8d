"""``smolstack convert``: converts a PDF file or scanned pages to Markdown, HTML or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolstack.cli import file_options, model_options, options
from smolstack.cli.console import note, show, show_json
from smolstack.cli.map_progress import progress
from smolstack.text import plural

EXAMPLES = """
**Examples**

`smolstack convert report.pdf --out report.md --model ibm-granite/granite-docling-258M`

`smolstack convert scans/ --out book.html --model docling-project/SmolDocling-256M-preview --dtype int8`

`smolstack convert report.pdf --out report.doctags --model ibm-granite/granite-docling-258M`

Cut off in any way, the same command goes on where it was.
"""  # noqa: E501 - a command is one line
SHOWN = 16  # maximum number of lines about pages


def convert(
    pages: Annotated[
        str,
        typer.Argument(
            metavar="PAGES",
            help="A PDF file, or a folder, glob or table of images; or the .parquet file of "
            "answers about pages written by `smolstack map`.",
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The document: .md, .html, .json or .doctags."
        ),
    ],
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    question: Annotated[
        str, typer.Option(help="The question about each page.")
    ] = "Convert this page to docling.",
    max_image_tokens: options.MaxImageTokens = None,
    password: file_options.Password = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per page.")] = 8192,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard earlier results and replace the document."),
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Convert the pages of a document with a document model (SmolDocling, granite-docling).

    Pages that cannot be opened, whose answer was cut off, or whose tags are damaged are listed at
    the end. If no page could be opened, or no page contains an element of a document, nothing is
    written.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from smolstack.documents import convert as convert_pages

    with progress(out) as tell:
        done = convert_pages(
            pages,
            out,
            model=model,
            revision=revision,
            base=base,
            mmproj=mmproj,
            dtype=dtype.value,
            device=device,
            question=question,
            restart=restart,
            on_progress=tell,
            max_image_tokens=max_image_tokens,
            password=password,
            max_new_tokens=max_new_tokens,
        )
    if json:
        show_json(
            {
                "out": str(done.out),
                "pages": done.pages,
                "unread": {page.name: page.error for page in done.unread},
                "cut": {page.name: page.finish_reason for page in done.cut},
                "remarks": [[remark.name, remark.text] for remark in done.remarks],
            }
        )
        return
    circles, cut = "went round in circles", "was cut off"
    lines = [f"{page.name}: not read: {page.error}" for page in done.unread]
    lines += [
        f"{page.name}: its reading {circles if page.finish_reason == 'repetition' else cut}; "
        "what was read is kept"
        for page in done.cut
    ]
    lines += [f"{remark.name}: {remark.text}" for remark in done.remarks]
    for line in lines[:SHOWN]:
        note(line)
    if len(lines) > SHOWN:
        note(f"and {len(lines) - SHOWN} more (--json lists all)")
    show(f"{done.out}: {plural(done.pages, 'page')}")
