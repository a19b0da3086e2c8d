"""``smolstack new``: writes a randomly initialized checkpoint in a published shape."""

from __future__ import annotations

import os
import shutil
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli.console import progress, show
from smolstack.errors import CheckpointError, ConfigError
from smolstack.output_files import check_new_folder
from smolstack.text import millions, size_in_bytes

if TYPE_CHECKING:
    from smolstack.config import ModelConfig
    from smolstack.family import Preset

EXAMPLES = """
**Examples**

`smolstack new --list`

`smolstack new smolvlm-256m ./random-256m --dtype bfloat16`

`smolstack new idefics3-8b ./small-8b --vision-layers 1 --text-layers 1 --seed 7`
"""


class StoredDtype(str, Enum):
    """Number formats in which weights can be stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _complete(incomplete: str) -> list[tuple[str, str]]:
    from smolstack.family import PRESETS

    return [(name, preset.hub_id) for name, preset in PRESETS.items() if incomplete in name]


def new(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET", help="A published shape; see --list.", autocompletion=_complete
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The folder to write.")
    ] = None,
    *,
    seed: Annotated[
        int, typer.Option(help="Seed of the weights: the same seed results in the same files.")
    ] = 0,
    dtype: Annotated[
        StoredDtype, typer.Option(help="Number format of the weights.")
    ] = StoredDtype.float32,
    vision_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the vision tower instead of the preset's.")
    ] = None,
    text_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the decoder instead of the preset's.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder.")
    ] = False,
    list_presets: Annotated[bool, typer.Option("--list", help="Show the presets.")] = False,
) -> None:
    """Write a Hugging Face folder in a published shape, with random weights.

    Its answers are meaningless; its files, shapes, token counts and speed are those of the real
    model. The tokenizer is newly trained.
    """
    from smolstack.family import PRESETS
    from smolstack.family import preset as find_preset

    if list_presets:
        _show_presets(list(PRESETS.values()))
        return
    if preset is None or folder is None:
        raise ConfigError("PRESET and DIR are needed; smolstack new --list shows the presets")
    chosen = find_preset(preset)
    check_new_folder(folder, CheckpointError, overwrite=overwrite)
    config = chosen.config.with_layers(vision_layers, text_layers)
    parameters = count_parameters(config)
    _check_room(parameters, dtype, folder)
    with progress(f"Making {preset}: {millions(parameters)} parameters …"):
        from smolstack.checkpoint.new import new_checkpoint

        new_checkpoint(
            chosen,
            folder,
            seed=seed,
            dtype=dtype.value,
            vision_layers=vision_layers,
            text_layers=text_layers,
            overwrite=overwrite,
        )
    size = size_in_bytes(sum(file.stat().st_size for file in folder.iterdir()))
    show(f"{folder}: {preset}, {millions(parameters)} parameters in {dtype.value}, {size}")


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a config, from a model on the meta device."""
    with progress("Counting parameters …"):
        from smolstack.checkpoint.verify import expected_shapes

    total = 0
    for shape in expected_shapes(config).values():
        elements = 1
        for length in shape:
            elements *= length
        total += elements
    return total


def _check_room(parameters: int, dtype: StoredDtype, folder: Path) -> None:
    """Raise an error if memory or disk space is insufficient, before anything is created."""
    needed = parameters * (4 if dtype is StoredDtype.float32 else 2)
    hint = "use fewer layers (--text-layers, --vision-layers) or --dtype bfloat16"
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise CheckpointError(
                f"the weights are {size_in_bytes(needed)}, this machine has "
                f"{size_in_bytes(memory)} of memory; {hint}"
            )
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"the weights are {size_in_bytes(needed)}, {place} has {size_in_bytes(free)} free; "
            f"{hint}"
        )


def _show_presets(presets: list[Preset]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Preset", style="cyan", no_wrap=True)
    table.add_column("Vision: hidden, layers, tile", no_wrap=True)
    table.add_column("Scale", justify="right")
    table.add_column("Tokens per tile", justify="right")
    table.add_column("Text: hidden, layers", no_wrap=True)
    table.add_column("Vocabulary", justify="right")
    table.add_column("Shape of", overflow="fold")
    for preset in presets:
        config = preset.config
        vision, text = config.vision, config.text
        table.add_row(
            preset.name,
            f"{vision.hidden_size}, {vision.num_layers}, {vision.image_size}",
            str(config.scale),
            str(config.tokens_per_tile),
            f"{text.hidden_size}, {text.num_layers}",
            f"{text.vocab_size:,}",
            preset.hub_id,
        )
    show(table)
