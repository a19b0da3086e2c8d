"""``smolstack train``: runs or resumes a training recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from smolstack.cli.console import pairs, show

EXAMPLES = """
**Examples**

`smolstack train recipe.toml`

`smolstack train recipe.toml --vision-dtype int8`

`smolstack train recipe.toml --resume`

`torchrun --nproc-per-node 2 -m smolstack.cli train recipe.toml`

A short recipe:

`output = "run"`

`[data]`

`train = "images"`

`[[stages]]`

`train = "connector"`

`steps = 500`
"""


def train(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A recipe in TOML; docs/training.md lists all keys."),
    ],
    *,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the run's last checkpoint, if there is one."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start over and replace an earlier run."),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Number of CPU threads. Default: torch's."),
    ] = None,
    vision_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What a frozen vision tower computes in: float32, bfloat16 or int8. "
            "Without it, as the recipe says.",
        ),
    ] = None,
    keep_language: Annotated[
        float | None,
        typer.Option(
            metavar="WEIGHT",
            min=0,
            help="Weight of the divergence from the model before a lora stage, on examples without "
            "images. Without it, as the recipe says.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
) -> None:
    """Train a connector, a text tower, a whole model or adapters according to a recipe.

    All files of a run are written to the recipe's output folder: checkpoints to resume from,
    metrics.jsonl, loss.png, evaluation.png, and at the end the trained checkpoint in model/.
    """
    from smolstack.train.recipe import Recipe

    read = Recipe.read(recipe)
    if vision_dtype is not None:
        read = replace(read, vision_dtype=vision_dtype)
    if keep_language is not None:
        read = read.keeping_language(keep_language)
    import torch

    from smolstack.train.trainer import train as run

    if threads is not None:
        torch.set_num_threads(threads)
    trained = run(read, resume=resume, overwrite=overwrite, quiet=quiet)
    if trained.rank:
        return
    rows = [("steps", f"{trained.steps:,}"), ("model", str(trained.model))]
    found = trained.evaluated
    if found is not None:
        rows.insert(1, ("evaluation loss", f"{found.loss:.4f}"))
    if found is not None and found.exact is not None and found.character_error_rate is not None:
        rows.insert(2, ("answers exact", f"{found.exact:.1%} of {len(found.answered)}"))
        rows.insert(3, ("character error rate", f"{found.character_error_rate:.1%}"))
    show(pairs(rows))
