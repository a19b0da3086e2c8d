"""The command: options, progress on stderr, a table or JSON on stdout, exit status."""

from __future__ import annotations

import gc
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from smolstack.cli import console
from smolstack.errors import SmolstackError
from smolstack.family import PRESETS, Preset, preset

LAYERS = 2
# One text layer if the embeddings alone (128k tokens, width 4096) take 4 GB.
FEWER_TEXT_LAYERS = {"idefics3-8b": 1}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Compare every published shape with transformers, stage by stage.")
def parity(
    names: Annotated[
        list[str] | None,
        typer.Option("--preset", help="A preset's name; may be given again. All, if not given."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of each tower, instead of the few by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Exit status: 0 all within bounds, 1 something over its bound, 2 bad input."""
    try:
        chosen = [preset(name) for name in names or PRESETS]
        wrong = _run(chosen, layers, as_json)
    except SmolstackError as error:
        console.error(str(error))
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        console.error(
            f"{error.name} is not installed; comparing needs it: pip install 'smolstack[dev]'"
        )
        raise typer.Exit(2) from error
    if wrong:
        raise typer.Exit(1)


def _run(chosen: list[Preset], layers: int | None, as_json: bool) -> bool:
    """Measure and print; return whether all differences are within bounds."""
    from transformers.utils import logging as transformers_logging

    from smolstack.interop.parity.measure import BOUNDS, Measured, measure
    from smolstack.interop.reference import VERSION

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    measured: list[Measured] = []
    for number, one in enumerate(chosen, start=1):
        label = f"[{number}/{len(chosen)}] {one.name}"
        result = measure(
            one,
            vision_layers=layers or LAYERS,
            text_layers=layers or FEWER_TEXT_LAYERS.get(one.name, LAYERS),
            say=lambda what, label=label: console.note(f"{label}: {what}"),  # type: ignore[misc]
        )
        measured.append(result)
        verdict = f"over its bound: {', '.join(result.over)}" if result.over else "within bounds"
        console.note(f"{label}: {verdict}, {result.seconds:.0f} s")
        gc.collect()
    if as_json:
        rows = [result.to_dict() for result in measured]
        console.show_json({"transformers": VERSION, "bounds": BOUNDS, "presets": rows})
    else:
        table = Table(title=f"Largest differences from transformers {VERSION}, float32")
        table.add_column("preset")
        table.add_column("layers", justify="right")
        for stage in (*BOUNDS, "spread"):
            table.add_column(stage, justify="right")
        bounds = [_number(stage, bound) for stage, bound in BOUNDS.items()]
        table.add_row("bound", "", *bounds, "", style="dim", end_section=True)
        for result in measured:
            cells = [
                _cell(stage, result.differences.get(stage), bound)
                for stage, bound in BOUNDS.items()
            ]
            layer_count = f"{result.vision_layers} + {result.text_layers}"
            table.add_row(result.preset, layer_count, *cells, f"{result.spread:.2f}")
        console.show(table)
    return any(result.over for result in measured)


def _cell(stage: str, value: float | None, bound: float) -> Text:
    if value is None:
        return Text("–", style="dim")
    return Text(_number(stage, value), style="green" if value <= bound else "bold red")


def _number(stage: str, value: float) -> str:
    counted = stage in ("token ids", "positions", "greedy tokens")
    return f"{value:.0f}" if counted else f"{value:.1e}"


def main() -> None:
    """Entry point of ``python -m smolstack.interop.parity``."""
    app(prog_name="python -m smolstack.interop.parity")
