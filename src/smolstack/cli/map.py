"""``smolstack map``: asks questions about many images, or embeds them, into one file."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolstack.cli import answer_options, file_options, model_options, options
from smolstack.cli.console import show, show_json
from smolstack.cli.map_progress import progress
from smolstack.errors import BulkError
from smolstack.text import plural

if TYPE_CHECKING:
    from smolstack.bulk import Summary

EXAMPLES = """
**Examples**

`smolstack map photos/ --question "What does it say?" --out answers.parquet`

`smolstack map "scans/**/*.png" -q "What is the total?" -q "Who sent it?" --out answers.jsonl`

`smolstack map images.csv --image-column file -q "Is it a cat?" --out answers.csv`

`smolstack map train.parquet --embed mean --embed-dtype float16 --out embeddings.parquet`

Cut off in any way, the same command goes on where it was.
"""
_INPUT, _BATCHES = "Input", "How the work is done"


class Embed(str, Enum):
    """Kinds of embeddings."""

    tokens = "tokens"
    mean = "mean"
    retrieval = "retrieval"


class EmbedDtype(str, Enum):
    """Number formats of embeddings."""

    float32 = "float32"
    float16 = "float16"


class Engine(str, Enum):
    """Engines that process a job."""

    embedded = "embedded"
    ray = "ray"


def map_(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder (with subfolders), a glob, or a JSONL, CSV or Parquet file of "
            "paths or bytes.",
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The output: .parquet, .jsonl or .csv."),
    ],
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            metavar="TEXT",
            help="The question about each image; repeatable.",
        ),
    ] = None,
    embed: Annotated[
        Embed | None,
        typer.Option(
            help="Instead of asking, save each image's visual tokens, their mean, or a retrieval "
            "model's vectors (for smolstack search)."
        ),
    ] = None,
    embed_dtype: Annotated[
        EmbedDtype, typer.Option(help="Number format of the embeddings.")
    ] = EmbedDtype.float32,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard earlier results and replace the output."),
    ] = False,
    image_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The table's column of paths or bytes. Default: recognized by name.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The table's column of image names. Default: recognized by name.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="Run in this process, or on Ray Data actors.", rich_help_panel=_BATCHES),
    ] = Engine.embedded,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of actors of --engine ray. Default: 1.", rich_help_panel=_BATCHES
        ),
    ] = None,
    batch_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum prompt tokens per batch, padding included.",
            rich_help_panel=_BATCHES,
        ),
    ] = 4096,
    batch_rows: Annotated[
        int, typer.Option(min=1, help="Maximum images per batch.", rich_help_panel=_BATCHES)
    ] = 16,
    window: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of images that are sorted into batches and stored together.",
            rich_help_panel=_BATCHES,
        ),
    ] = 256,
    schema: options.SchemaOption = None,
    regex: options.RegexOption = None,
    choice: options.ChoiceOption = None,
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    split: options.SplitOption = None,
    max_image_tokens: options.MaxImageTokens = None,
    upscale: options.Upscale = True,
    password: file_options.Password = None,
    max_new_tokens: options.MaxNewTokens = 512,
    stop: options.Stop = None,
    stop_on_repetition: options.StopOnRepetition = False,
    keep_special_tokens: options.KeepSpecialTokens = False,
    special_tokens_in_text: options.SpecialTokensInText = True,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    json: options.JsonOption = False,
) -> None:
    """Ask the same questions about many images, or embed them; rows are in the order of the input.

    An image that cannot be read results in a row with its error. After an interruption, the same
    command continues without losing results or repeating work.
    """
    chosen = answer_options.generation_options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        stop_on_repetition=stop_on_repetition,
        keep_special_tokens=keep_special_tokens,
        split=split,
        max_image_tokens=max_image_tokens,
        upscale=upscale,
        password=password,
    )
    chosen.update(answer_options.form_options(schema, regex, choice))
    map_images = _library(threads)
    with progress(out) as tell:
        summary = map_images(
            images,
            question or [],
            out=out,
            model=model,
            revision=revision,
            base=base,
            mmproj=mmproj,
            dtype=dtype.value,
            device=device,
            embed=None if embed is None else embed.value,
            embed_dtype=embed_dtype.value,
            image_column=image_column,
            id_column=id_column,
            batch_tokens=batch_tokens,
            batch_rows=batch_rows,
            window=window,
            engine=engine.value,
            workers=workers,
            restart=restart,
            special_tokens_in_text=special_tokens_in_text,
            on_progress=tell,
            **chosen,
        )
    if json:
        show_json({**asdict(summary), "out": str(summary.out)})
    else:
        show(_line(summary))


def _library(threads: int | None) -> Any:
    """Return map_images, after setting torch's threads."""
    try:
        from smolstack.bulk import map_images
    except ImportError as error:
        raise BulkError(str(error)) from None
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return map_images


def _line(summary: Summary) -> str:
    bad = summary.bad_images
    errors = f", {bad:,} of them with an error" if bad else ""
    earlier = f" ({summary.kept:,} by an earlier run)" if summary.kept else ""
    return (
        f"{summary.out}: {plural(summary.rows, 'row')} about "
        f"{plural(summary.images, 'image')}{earlier}{errors}"
    )
