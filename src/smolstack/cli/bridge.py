"""``smolstack bridge``: combines the vision tower of one model and the text tower of another."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli.console import note, pairs, progress, show
from smolstack.errors import CheckpointError
from smolstack.output_files import check_new_folder

if TYPE_CHECKING:
    from smolstack.bridging import Bridge

EXAMPLES = """
**Examples**

`smolstack bridge google/siglip2-base-patch16-512 HuggingFaceTB/SmolLM2-135M-Instruct ./bridged`

`smolstack bridge reader SmolLM2-135M-Instruct.gguf ./bridged --longest-edge 512`

`smolstack bridge ./siglip ./llama ./bridged --visual-tokens 64 --chat-template family`
"""
READER = "reader"  # the bundled reader, unless a folder has this name


class BridgedDtype(str, Enum):
    """Number formats in which a bridged model's weights can be stored."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def bridge(
    vision: Annotated[
        str,
        typer.Argument(
            metavar="VISION",
            help="A checkpoint of the family or a plain SigLIP, as a folder or hub id; reader is "
            "the bundled reader.",
        ),
    ],
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="A checkpoint of the family, a plain LlamaForCausalLM (folder or hub id), or a "
            "GGUF file of a Llama.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    *,
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Visual tokens per tile. Default, without --scale: the vision checkpoint's, or "
            "for a SigLIP as close to 64 as its grid allows.",
        ),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Alternatively, the edge of the square of patches that becomes one visual token.",
        ),
    ] = None,
    longest_edge: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels to which an image's longer side is resized before it is split into tiles. "
            "Default: the vision checkpoint's, or four tiles for a SigLIP.",
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="text|family|FILE",
            help="The text model's template with images added, that of Idefics3, or a Jinja file. "
            "Default: the text model's, if it has one.",
        ),
    ] = None,
    dtype: Annotated[
        BridgedDtype,
        typer.Option(help="Number format of the weights; auto preserves both towers exactly."),
    ] = BridgedDtype.auto,
    seed: Annotated[
        int, typer.Option(help="Seed of the connector and of the new tokens' embeddings.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder.")
    ] = False,
) -> None:
    """Write a checkpoint that combines a vision tower and a text tower.

    The connector between them is untrained; train it with `smolstack train`. Image tokens are added
    to a plain language model; no existing token id changes, and answers to text alone stay the
    same.
    """
    check_new_folder(folder, CheckpointError, overwrite=overwrite)
    with progress("Reading the towers …"):
        from smolstack.bridging import plan_bridge

        planned = plan_bridge(
            _named(vision),
            _named(text),
            scale=scale,
            visual_tokens=visual_tokens,
            longest_edge=longest_edge,
            chat_template=chat_template,
            dtype=dtype.value,
        )
    for told in planned.notes:
        note(told)
    with progress(f"Writing {folder} …"):
        planned.write(folder, seed=seed, overwrite=overwrite)
    show(pairs(_rows(planned, folder)))


def _named(model: str) -> str | None:
    return None if model == READER and not os.path.exists(model) else model


def _rows(bridge: Bridge, folder: Path) -> list[tuple[str, str]]:
    from smolstack.bridging.grid import tiles_along

    vision, text, config = bridge.vision.config, bridge.text.config, bridge.config
    grid, scale = f"{vision.side}×{vision.side}", f"{config.scale}"
    width = vision.hidden_size * config.scale**2
    edge = bridge.settings.longest_edge
    dtype = str(bridge.dtype).removeprefix("torch.")
    tiles = tiles_along(bridge.settings)
    return [
        (
            "vision tower",
            f"{vision.num_layers} layers, {vision.hidden_size} wide, tiles of "
            f"{bridge.settings.tile_edge} pixels",
        ),
        (
            "connector",
            f"{grid} patches by scale {scale}: {config.tokens_per_tile} visual tokens a tile; "
            f"{width:,} → {text.hidden_size:,}, untrained",
        ),
        (
            "images",
            f"longer side {edge} pixels, up to {tiles}×{tiles} tiles",
        ),
        ("text tower", f"{text.num_layers} layers, {text.hidden_size} wide"),
        ("vocabulary", _vocabulary(bridge)),
        ("weights", dtype),
        ("model", str(folder)),
    ]


def _vocabulary(bridge: Bridge) -> str:
    total = bridge.config.text.vocab_size
    if not bridge.added:
        return f"{total:,} tokens, image tokens among them"
    ids = sorted(bridge.added)
    return f"{total:,} tokens, {len(ids)} of them new, {ids[0]} to {ids[-1]}"
