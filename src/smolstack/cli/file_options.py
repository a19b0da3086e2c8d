"""Options about how files are opened, shared by commands."""

from __future__ import annotations

from typing import Annotated

import typer

Password = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        envvar="SMOLSTACK_PASSWORD",
        help="Password of encrypted PDF files.",
        rich_help_panel="Images",
    ),
]
