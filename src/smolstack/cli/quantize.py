"""``smolstack quantize``: a checkpoint's large matrices to 8 and 4 bits, fitted to data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli import options
from smolstack.cli.console import pairs, show, show_json
from smolstack.text import size_in_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from smolstack.quantization_job.results import Block, Quantized

EXAMPLES = """
**Examples**

`smolstack quantize HuggingFaceTB/SmolVLM-256M-Instruct ./int8`

`smolstack quantize ./model ./int4 --bits 4 --calibrate chats.jsonl`

`smolstack quantize ./model ./small --bits 6.2 --calibrate images/ --question "Read the label."`

Stopped in any way, the same command goes on where it was.
"""


def quantize(
    model: options.ModelArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; complete or not at all.")
    ],
    *,
    bits: Annotated[
        float,
        typer.Option(
            min=4,
            max=8,
            help="8, 4 (the head keeps 8), or a number between: bits a weight of the decoder's "
            "layers and the head on average, scales and zero points included.",
        ),
    ] = 8,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="A folder of images, a .jsonl file of chats or images, or a text file; without "
            "it, what the model writes, and images that are drawn.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="Of the data that are read, visual ones included.")
    ] = 8192,
    question: Annotated[
        str, typer.Option(help="Goes with images that come without one.")
    ] = "Describe this image.",
    revision: options.RevisionOption = None,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an earlier run that was stopped kept.")
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Quantize a checkpoint, fitted to data, and measure what it costs.

    The vision tower and the connector get 8 bits, the text tower what is asked for.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from smolstack.quantization_job.job import quantize as run

    with _progress() as tell:
        done = run(
            model,
            out,
            bits=bits,
            calibrate=calibrate,
            tokens=tokens,
            question=question,
            device=device,
            revision=revision,
            overwrite=overwrite,
            restart=restart,
            on_progress=tell,
        )
    if json:
        show_json({**asdict(done), "out": str(done.out)})
        return
    show(_table(done.blocks), pairs(_facts(done)))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, one stage after the other; nothing unless that is a terminal."""
    import sys

    from smolstack.train.progress import Display

    stage = ""
    with Display(sys.stderr.isatty()) as display:

        def tell(what: str, done: int, count: int) -> None:
            nonlocal stage
            kind, _, block = what.partition("quantizing ")
            name = "quantizing" if block and not kind else what
            if name != stage:
                stage = name
                display.begin(name, count, done - 1 if done else 0)
            if done:
                display.advance(block if name == "quantizing" else "")

        yield tell


def _facts(done: Quantized) -> list[tuple[str, str]]:
    rows = [
        ("folder", str(done.out)),
        ("text tower", f"{done.bits:.2f} bits a weight, {size_in_bytes(done.text_bytes)}"),
        ("calibrated on", f"{done.tokens:,} tokens"),
    ]
    if done.divergence is not None and done.agreement is not None:
        rows += [
            ("measured on", f"{done.held_out:,} tokens that were held out"),
            ("perplexity", f"{done.perplexity:,.2f} before, {done.perplexity_after:,.2f} after"),
            ("KL divergence", f"{done.divergence:.4f} nats a token"),
            ("same likeliest token", f"{done.agreement:.1%}"),
        ]
    return rows


def _table(blocks: tuple[Block, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Layer", style="cyan", no_wrap=True)
    table.add_column("Bits", justify="right")
    table.add_column("8 bits", overflow="fold")
    table.add_column("Relative error", justify="right")
    for block in blocks:
        eight = [name.rpartition(".")[2] for name, bits in block.formats.items() if bits == 8]
        kept = "all" if len(eight) == len(block.formats) else ", ".join(eight) or "none"
        table.add_row(block.name, f"{block.bits:.2f}", kept, f"{block.error:.4f}")
    return table
