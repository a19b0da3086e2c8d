"""``smolstack bench``: compares smolstack and its peers by ratios of medians."""

from __future__ import annotations

import json as jsonlib
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli import options
from smolstack.cli.bench_output import progress, saving
from smolstack.cli.console import note, show, show_json

if TYPE_CHECKING:
    from smolstack.bench.record import Record

EXAMPLES = """
**Examples**

`smolstack bench vision --dtype bfloat16,int8 --plot roofline.png`

`smolstack bench prefill decode --threads 2 --rounds 9 --save text.json`

`smolstack bench ask --match 17 --only "smolstack int8" --only "transformers bfloat16"`

`smolstack bench quality --dtype bfloat16,int8,int4`

`smolstack bench quality --model ./SmolVLM-256M --also ./SmolVLM-256M-int4 --text letters.txt`

`smolstack bench train --save train.json`

`smolstack bench --add vision.json --add text.json --markdown`
"""


class What(str, Enum):
    """Parts and studies that can be measured."""

    connector = "connector"
    vision = "vision"
    prefill = "prefill"
    decode = "decode"
    images = "images"
    ask = "ask"
    load = "load"
    memory = "memory"
    import_ = "import"
    structured = "structured"
    questions = "questions"
    reuse = "reuse"
    train = "train"
    quality = "quality"
    growth = "growth"
    budget = "budget"


_QUALITY = "Quality on a checkpoint's own weights"


def bench(
    context: typer.Context,
    what: Annotated[
        list[What] | None,
        typer.Argument(help="What to measure; one or more.", show_default=False),
    ] = None,
    *,
    preset: Annotated[
        str, typer.Option(help="A published shape; its weights are random.")
    ] = "smolvlm-256m",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="smolstack's precisions, separated by commas. Default: all but float16.",
            show_default=False,
        ),
    ] = None,
    threads: options.ThreadsOption = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Alternating runs of each contender. Default: 7; train: 1, at most 3.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Time per case after which no further round starts."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With quality: a checkpoint whose precisions are compared with float32.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure on. Default: a text included in smolstack.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Images to measure on. Default: a few drawn images.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="The same model saved quantized; repeatable.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    outliers: Annotated[
        bool,
        typer.Option(
            "--outliers",
            help="Measure images again with outlier channels added to the vision tower.",
            rich_help_panel=_QUALITY,
        ),
    ] = False,
    timed: Annotated[
        bool,
        typer.Option(
            "--timed/--untimed",
            help="Also measure the time per decoded token, --rounds times.",
            rich_help_panel=_QUALITY,
        ),
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Only contenders whose name contains this; repeatable."),
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Only cases whose name contains this; repeatable."),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Results of an earlier run to show with these."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Keep the random checkpoint and the peers' versions of it there for later runs."
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the results as JSON, those so far after each measurement. The same command "
            "continues an interrupted run."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot the results: the roofline, and the studies."),
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print Markdown tables.")] = False,
    json: options.JsonOption = False,
) -> None:
    """Measure smolstack, and every peer that is installed, in one run.

    Peers: transformers (train: its Trainer, with peft); onnxruntime and OpenVINO for the vision
    tower; llama.cpp (llama-cpp-python) for text. All run in turn on the same weights and inputs;
    medians are compared. growth, budget and quality study smolstack alone; quality with --model
    measures a checkpoint's own weights, and llama.cpp's types of the same beside it.
    """
    import torch

    from smolstack.bench import plots
    from smolstack.bench.record import Record
    from smolstack.bench.running import DTYPES as USUAL
    from smolstack.bench.running import Choice, absences, run
    from smolstack.bench.timing import ROUNDS
    from smolstack.checkpoint.load import DTYPES, QUANTIZED
    from smolstack.errors import ConfigError
    from smolstack.family import preset as find_preset

    found = find_preset(preset)
    dtypes = () if dtype is None else _read_dtypes(dtype, [*DTYPES, *QUANTIZED])
    if not what and not add:
        raise ConfigError(f"nothing to measure, expected some of {[w.value for w in What]}")
    if threads is not None:
        torch.set_num_threads(threads)
    parts = list(dict.fromkeys(part.value for part in what or ()))
    # Measuring takes long: files that cannot be read or written are reported before it.
    for path in add or ():
        Record(preset, {}, {}).add(path)
    if plot is not None:
        plots.check_plot(plot)
    with nullcontext() if save is None else saving(save) as beside:
        if model is None:
            _refuse(context, _OF_A_MODEL, "needs --model FOLDER")
            for sentence in absences(parts, dtypes):
                note(sentence)
            choice = Choice(parts, dtypes, rounds, seconds, only or (), match or (), folder)
            record = run(found, choice, progress, save, note)
        else:
            from smolstack.cli import bench_quality

            _check_quality(context, parts)
            record = bench_quality.measure(
                model,
                dtypes or USUAL,
                also=also or (),
                text=text,
                images=images,
                outliers=outliers,
                rounds=(rounds or ROUNDS) if timed else 0,
                only=only or (),
                folder=folder,
                save=save,
            )
        for path in reversed(add or ()):
            record.add(path)
        if beside is not None:
            content = jsonlib.dumps(record.to_dict(), indent=1) + "\n"
            beside.write_text(content, encoding="utf-8")
    if plot is not None:
        for path in plots.draw(record.results, record.studies, record.limits, plot):
            note(f"wrote {path}")
    _show(record, json=json, markdown=markdown)


def _show(record: Record, *, json: bool, markdown: bool) -> None:
    """Print the results on stdout in the requested format."""
    from smolstack.bench import report, targets

    reached = targets.reached(record.results, record.studies)
    if json:
        show_json({**record.to_dict(), "targets": reached})
    elif markdown:
        page = report.markdown(record.results, record.studies, record.limits)
        typer.echo(page + targets.markdown(reached), nl=False)
    else:
        if record.results:
            show(report.table(record.results, record.limits))
        show(*(report.rows_table(title, rows) for title, rows in record.studies.items()))
        show(report.machine_line(record.machine, record.limits))


_OF_A_MODEL = ("text", "images", "also", "outliers", "timed")
_OF_A_PRESET = ("preset", "seconds", "match")


def _check_quality(context: typer.Context, parts: list[str]) -> None:
    """Raise an error for options that do not apply with --model, before anything is loaded."""
    from smolstack.errors import ConfigError

    if parts != [What.quality.value]:
        raise ConfigError(f"--model applies to quality only, found {parts}")
    _refuse(context, _OF_A_PRESET, "has no meaning beside --model")


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    from smolstack.errors import ConfigError

    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name} {why}")


def _read_dtypes(text: str, known: list[str]) -> tuple[str, ...]:
    from smolstack.errors import ConfigError

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ConfigError(f"dtype is {name!r}, expected some of {known}")
    return names
