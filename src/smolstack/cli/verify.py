"""``smolstack verify``: checks that a checkpoint is complete and its files are consistent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli import model_options, options
from smolstack.cli.console import progress, show, show_json
from smolstack.text import plural

if TYPE_CHECKING:
    from rich.table import Table

    from smolstack.checkpoint.verification.check import Check

EXAMPLES = """
**Examples**

`smolstack verify ./my-checkpoint`

`smolstack verify ./my-checkpoint --values && echo good`

The exit code is 0 when nothing is wrong, 1 when something is, 2 when there is nothing to look at.
"""
SOMETHING_WRONG = 1


def verify(
    model: options.OptionalModelArgument = None,
    *,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    values: Annotated[
        bool,
        typer.Option("--values", help="Also read every weight and look for NaN and infinity."),
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Check every weight, shape, number format, tie, token id and setting of a checkpoint.

    All differences are listed, not only the first.
    """
    with progress(f"Checking {model or 'the bundled reader'} …"):
        from smolstack.checkpoint.hub import locate
        from smolstack.checkpoint.verification.checkpoint import check_checkpoint

        folder = locate(model, revision, base=base, mmproj=mmproj)
        checks = check_checkpoint(folder, values=values)
    problems = sum(len(check.problems) for check in checks)
    if json:
        show_json(
            {
                "folder": str(folder),
                "ok": problems == 0,
                "checks": [check.to_dict() for check in checks],
            }
        )
    else:
        show(_report(checks))
        verdict = f"{plural(problems, 'difference')}" if problems else "nothing is wrong"
        show(f"{folder}: {plural(len(checks), 'check')}, {verdict}")
    if problems:
        raise typer.Exit(SOMETHING_WRONG)


def _report(checks: list[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        style = {"ok": "green", "wrong": "bold red", "skipped": "yellow"}[check.state]
        table.add_row(Text(check.state, style), Text(check.name), Text(check.found))
        for problem in check.problems:
            table.add_row("", "", Text(problem, "red"))
        for remark in check.remarks:
            table.add_row("", "", Text(f"note: {remark}", "yellow"))
    return table
