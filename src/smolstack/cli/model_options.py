"""Options that name a model's other files: an adapter's base, a GGUF model's vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "Model"

BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="FOLDER|HUB_ID",
        help="The base checkpoint of an adapter, instead of the one that it names.",
        rich_help_panel=_MODEL,
    ),
]
MmprojOption = Annotated[
    Path | None,
    typer.Option(
        "--mmproj",
        metavar="FILE",
        help="The GGUF file of the vision tower, if the model is a GGUF file.",
        rich_help_panel=_MODEL,
    ),
]
