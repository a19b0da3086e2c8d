"""``smolstack export``: exports a checkpoint as ONNX graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli import model_options, options
from smolstack.cli.console import progress, show, show_json
from smolstack.errors import CheckpointError
from smolstack.output_files import check_new_folder
from smolstack.text import size_in_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from smolstack.interop.onnx import ExportedGraph

EXAMPLES = """
**Examples**

`smolstack export ./my-checkpoint ./exported`

`smolstack export HuggingFaceTB/SmolVLM-256M-Instruct ./exported --dtype fp32 --dtype int8`

`python examples/onnx_loop.py ./exported examples/number.png "What does it say?"`
"""


class ExportDtype(str, Enum):
    """Number formats of exported graphs."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


def export(
    model: options.ModelArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    *,
    dtype: Annotated[
        list[ExportDtype],
        typer.Option(
            help="Number format of the graphs; repeatable. The first one is the default of "
            "transformers.js."
        ),
    ] = [ExportDtype.fp32],  # noqa: B006 - typer's way to give a list a default
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder.")
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Write a checkpoint as ONNX graphs, for onnxruntime and transformers.js.

    The graphs are vision encoder, token embeddings and decoder with its cache. Each is compared
    with torch before the folder is written. The tokenizer's and the processor's files are included.
    """
    check_new_folder(folder, CheckpointError, overwrite=overwrite)
    with progress("Starting …"):
        from smolstack.interop.onnx import count_steps
        from smolstack.interop.onnx import export as write

    names = [entry.value for entry in dtype]
    with _steps(count_steps(names)) as on_step:
        graphs = write(
            model,
            folder,
            dtypes=names,
            revision=revision,
            base=base,
            mmproj=mmproj,
            overwrite=overwrite,
            on_step=on_step,
        )
    if json:
        show_json(
            {
                "folder": str(folder),
                "graphs": [
                    {
                        "file": graph.path.as_posix(),
                        "dtype": graph.precision.value,
                        "bytes": graph.size,
                        "difference": graph.difference,
                    }
                    for graph in graphs
                ],
            }
        )
        return
    show(_report(graphs))
    show(f"{folder}: {size_in_bytes(sum(graph.size for graph in graphs))}")


@contextmanager
def _steps(count: int) -> Iterator[Callable[[str], None] | None]:
    """Show a bar on stderr that counts steps, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(file=sys.stderr, highlight=False),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=count)

        def on_step(message: str) -> None:
            bar.update(task, description=f"{message} …", advance=1)

        yield on_step


def _report(graphs: list[ExportedGraph]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Graph", style="cyan", no_wrap=True)
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Difference from torch", justify="right")
    for graph in graphs:
        exact = graph.precision.value == "fp32"
        gap = f"{graph.difference:.1e}" if exact else f"{graph.difference:.2%}"
        table.add_row(graph.path.name, size_in_bytes(graph.size), gap)
    return table
