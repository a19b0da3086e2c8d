"""``smolstack bench``: smolstack and transformers in turn, as ratios of medians."""

from __future__ import annotations

import json as jsonlib
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from smolstack.cli import options
from smolstack.cli.console import progress, show, show_json

EXAMPLES = """
**Examples**

`smolstack bench connector`

`smolstack bench vision prefill decode --threads 2 --rounds 9`

`smolstack bench ask --preset smolvlm-500m --dtype bfloat16 --save results.json`
"""


class What(str, Enum):
    """Parts that can be measured."""

    connector = "connector"
    vision = "vision"
    prefill = "prefill"
    decode = "decode"
    images = "images"
    ask = "ask"
    load = "load"
    structured = "structured"
    questions = "questions"


def bench(
    what: Annotated[list[What], typer.Argument(help="What to measure; several are allowed.")],
    *,
    preset: Annotated[
        str, typer.Option(help="A published shape; its weights are random.")
    ] = "smolvlm-256m",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: options.ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender, in turn.")] = 7,
    save: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table.")] = False,
    json: options.JsonOption = False,
) -> None:
    """Measure smolstack, and transformers where it is installed, in one run.

    Contenders run alternately on the same weights and inputs; medians are compared.
    """
    import torch

    from smolstack.bench import machine, report
    from smolstack.bench.cases import Bench
    from smolstack.bench.timing import measure
    from smolstack.checkpoint.load import DTYPES
    from smolstack.errors import ConfigError
    from smolstack.family import preset as find_preset

    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {list(DTYPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    made = Bench(find_preset(preset), DTYPES[dtype])
    described = machine.describe()
    results = []
    with progress("Measuring the machine …"):
        limits = machine.limits(DTYPES[dtype])
    for part in dict.fromkeys(what):
        with progress(f"Measuring {part.value} …"):
            for case in getattr(made, part.value)():
                results += measure(case, rounds)
    data = {"preset": preset, **report.to_dict(results, described, limits)}
    if save is not None:
        save.write_text(jsonlib.dumps(data, indent=2) + "\n", encoding="utf-8")
    if json:
        show_json(data)
    elif markdown:
        typer.echo(report.markdown(results), nl=False)
    else:
        versions = ", ".join(f"{name} {v}" for name, v in described["versions"].items())
        show(report.table(results, limits))
        show(
            f"{described['processor']} ({described['capability']}), {described['threads']} "
            f"threads, {limits['matmul_gflops']:.0f} GFLOP/s, "
            f"{limits['read_gigabytes']:.0f} GB/s; {versions}"
        )
