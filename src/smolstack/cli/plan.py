"""``smolstack plan``: shows the tiles and tokens of images without loading weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolstack.cli import file_options, model_options, options
from smolstack.cli.ask import STDIN, plan_json, read_image, size
from smolstack.cli.console import count, note, pairs, progress, show, show_json
from smolstack.errors import ImageError
from smolstack.text import millions, plural

if TYPE_CHECKING:
    from smolstack.checkpoint.hub import ModelPath
    from smolstack.processor.geometry import TilePlan
    from smolstack.processor.inputs import ImageOptions
    from smolstack.processor.processor import Processor
    from smolstack.processor.tiles import ImageSource

EXAMPLES = """
**Examples**

`smolstack plan page.png`

`smolstack plan 1920x1080 640x480 --model HuggingFaceTB/SmolVLM-256M-Instruct`

`smolstack plan page.png --out plan.png`

`smolstack plan *.png --question "Read this page." --json`
"""
_SIZE = re.compile(r"([0-9]+)[x×X]([0-9]+)")


@dataclass(frozen=True)
class Planned:
    """An image, or a size, with its plan and the plan's prompt tokens."""

    name: str
    image: ImageSource | tuple[int, int]
    plan: TilePlan

    @property
    def prompt_tokens(self) -> int:
        return self.plan.prompt_tokens or 0


def plan(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Image files, - for stdin, or sizes such as 1920x1080."
        ),
    ],
    *,
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    question: Annotated[
        str,
        typer.Option("--question", "-q", help="Count the tokens of the prompt with this question."),
    ] = "",
    split: options.SplitOption = None,
    max_image_tokens: options.MaxImageTokens = None,
    upscale: options.Upscale = True,
    password: file_options.Password = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Draw the tiles over the image here."),
    ] = None,
    json: options.JsonOption = False,
) -> None:
    """Show how images are split into tiles and tokens. Loads no weights."""
    if out is not None and len(images) != 1:
        raise ImageError(f"--out needs exactly one image, found {len(images)}")
    if images.count(STDIN) > 1:
        raise ImageError(f"- is given {images.count(STDIN)} times, but stdin contains one image")
    with progress("Planning …"):
        from smolstack.checkpoint.hub import locate

        processor = load_processor(locate(model, revision, base=base, mmproj=mmproj))
        context = processor.config.text.max_positions
        image_options: ImageOptions = {
            "split": split,
            "max_image_tokens": max_image_tokens,
            "upscale": upscale,
            "password": password,
        }
        planned = [_planned(processor, image, question, image_options) for image in images]
        together = processor.count_tokens([entry.plan for entry in planned], question)
        if out is not None:
            from smolstack.processor.plan_drawing import draw_plan, save_image

            save_image(draw_plan(planned[0].image, planned[0].plan, planned[0].name), out)
    if json:
        show_json(_as_json(planned, context, together))
    elif len(planned) == 1:
        show(pairs(_one(planned[0], context)))
    else:
        _show_several(planned, context, together)
    if out is not None and not json:
        note(f"wrote {out}")


def load_processor(where: ModelPath) -> Processor:
    """Return the processor of a checkpoint without reading its weights."""
    from smolstack.checkpoint.processor_files import build_processor, files_alone
    from smolstack.config import ModelConfig

    files = files_alone(where)
    return build_processor(files, ModelConfig.from_hf(files.config))


def read_size(text: str) -> tuple[int, int] | None:
    """Return ``1920x1080`` as (1920, 1080); None if the text is not a size."""
    match = _SIZE.fullmatch(text)
    return None if match is None else (int(match[1]), int(match[2]))


def _planned(
    processor: Processor, image: str, question: str, image_options: ImageOptions
) -> Planned:
    from smolstack.processor.inputs import with_password

    given = None if Path(image).exists() else read_size(image)
    source: ImageSource | tuple[int, int]
    source = given if given else with_password(read_image(image), image_options.get("password"))
    made = processor.plan(source, **image_options)
    made = made.with_prompt_tokens(processor.count_tokens([made], question))
    return Planned("stdin" if image == STDIN else image, source, made)


def _as_json(planned: list[Planned], context: int, together: int) -> dict[str, Any]:
    return {
        "context": context,
        "prompt_tokens": together,
        "share_of_context": together / context,
        "images": [
            {
                **plan_json(entry.name, entry.plan),
                "boxes": [list(box) for box in entry.plan.source_boxes()],
                "prompt_tokens": entry.prompt_tokens,
                "share_of_context": entry.prompt_tokens / context,
            }
            for entry in planned
        ],
    }


def _one(entry: Planned, context: int) -> list[tuple[str, str]]:
    made = entry.plan
    edge = made.tile_edge
    return [
        ("image", f"{entry.name}, {size(made.source)}"),
        ("resized", size(made.resized)),
        ("canvas", f"{size(made.canvas)}{_stretch(made)}"),
        ("grid", _grid(made)),
        ("tiles", f"{made.tiles} of {edge}x{edge}{_whole(made)}"),
        ("visual tokens", f"{count(made.visual_tokens)} ({made.tokens_per_tile} per tile)"),
        ("prompt tokens", count(entry.prompt_tokens)),
        ("context", _share(entry.prompt_tokens, context)),
        ("pixels read", f"{count(made.pixels_read)} of {count(_pixels(made))} in the image"),
    ]


def _show_several(planned: list[Planned], context: int, together: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Image", style="cyan", overflow="fold")
    for header in ("Size", "Resized", "Canvas", "Grid", "Tiles"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("Visual tokens", "Prompt tokens", "Context", "Pixels read"):
        table.add_column(header, justify="right")
    for entry in planned:
        made = entry.plan
        table.add_row(
            Text(entry.name),
            size(made.source),
            size(made.resized),
            size(made.canvas),
            f"{made.rows}x{made.cols}" if made.rows else "whole",
            str(made.tiles),
            count(made.visual_tokens),
            count(entry.prompt_tokens),
            f"{entry.prompt_tokens / context:.1%}",
            millions(made.pixels_read),
            style="red" if entry.prompt_tokens >= context else None,
        )
    show(table, f"all in one prompt: {_share(together, context)}")


def _share(tokens: int, context: int) -> str:
    told = f"{count(tokens)} of {count(context)} tokens, {tokens / context:.1%} of the context"
    if tokens > context:
        return f"{told}: too many to ask"
    return f"{told}, which leaves no room for an answer" if tokens == context else told


def _grid(made: TilePlan) -> str:
    if not made.rows:
        return "none: the image is read as one tile"
    return f"{plural(made.rows, 'row')}, {plural(made.cols, 'column')}"


def _whole(made: TilePlan) -> str:
    return f" ({made.rows * made.cols} cut and the whole image)" if made.rows else ""


def _stretch(made: TilePlan) -> str:
    """Describe how the canvas changes the image's aspect ratio, if noticeably."""
    (width, height), (wide, high) = made.source, made.canvas
    ratio = (high / height) / (wide / width)
    if 0.995 < ratio < 1.005:
        return ""
    if ratio > 1:
        return f" (heights stretched {ratio:.2f} times against widths)"
    return f" (widths stretched {1 / ratio:.2f} times against heights)"


def _pixels(made: TilePlan) -> int:
    return made.source[0] * made.source[1]
