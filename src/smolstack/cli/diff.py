"""``smolstack diff``: which parts of a checkpoint changed, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli import model_options, options
from smolstack.cli.console import count, progress, show, show_json
from smolstack.text import millions, plural

if TYPE_CHECKING:
    from rich.table import Table

    from smolstack.checkpoint.diff import Change, Differences

EXAMPLES = """
**Examples**

`smolstack diff ./base ./fine-tuned`

`smolstack diff ./base ./fine-tuned --top 20`

`smolstack diff a b --exit-code && echo the same`

With `--exit-code` it ends with 1 when anything differs; 2 is for what cannot be read.
"""
DIFFERENT = 1


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint folder or a hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another checkpoint.")],
    *,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    top: Annotated[
        int, typer.Option(min=0, help="Number of tensors to show, most changed first.")
    ] = 8,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with code 1 if anything differs.")
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Compare two checkpoints: which parts changed, by how much, and which settings differ.

    A change is ‖B − A‖ / ‖A‖, the Euclidean norm of all weights of a part or a tensor. Weights are
    memory-mapped and read tensor by tensor. `--base` and `--mmproj` apply to B.
    """
    with progress(f"Comparing {a} and {b} …"):
        from smolstack.checkpoint.diff import diff_checkpoints
        from smolstack.checkpoint.hub import find, locate

        found = diff_checkpoints(find(a, None), locate(b, base=base, mmproj=mmproj))
    if json:
        show_json(found.to_dict())
    else:
        _report(found, top)
    if exit_code and not found.same:
        raise typer.Exit(DIFFERENT)


def _report(found: Differences, top: int) -> None:
    if found.parts:
        show(_table("Part", found.parts))
    most = found.most_changed(top)
    if most:
        show(_table("Most changed", most))
    for names, where in ((found.only_a, "A"), (found.only_b, "B")):
        if names:
            shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
            show(f"only in {where}: {plural(len(names), 'tensor')}: {shown}")
    for name, shapes in list(found.reshaped.items())[:8]:
        show(f"another shape: {name} {shapes}")
    for kind in sorted(set(found.formats.values())):
        same = sum(value == kind for value in found.formats.values())
        show(f"another number format: {plural(same, 'tensor')} {kind}")
    for name, (old, new) in found.settings.items():
        show(f"{name}: {old} → {new}")
    changed = sum(change.changed for change in found.tensors)
    if found.same:
        show("nothing differs")
    else:
        show(f"{count(changed)} of {plural(len(found.tensors), 'tensor')} differ")


def _table(title: str, changes: tuple[Change, ...] | list[Change]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, style="cyan", no_wrap=True)
    for name in ("Changed", "Parameters", "Change", "Largest"):
        table.add_column(name, justify="right", no_wrap=True)
    for change in changes:
        same = change.changed == 0
        table.add_row(
            change.name,
            f"{change.changed} of {change.tensors}",
            millions(change.parameters),
            "none" if same else f"{100 * change.relative:.3g}%",
            "" if same else f"{change.largest:.3g}",
        )
    return table
