"""``smolstack convert-checkpoint``: any checkpoint that is read, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolstack.cli import model_options, options
from smolstack.cli.console import progress, show
from smolstack.errors import CheckpointError, ConfigError
from smolstack.output_files import check_new_folder
from smolstack.text import size_in_bytes

if TYPE_CHECKING:
    from smolstack.checkpoint.hub import ModelPath

EXAMPLES = """
**Examples**

`smolstack convert-checkpoint lusxvr/nanoVLM-230M-8k ./nanovlm --tokenizer ./SmolLM2-135M`

`smolstack convert-checkpoint model.gguf ./model --mmproj mmproj.gguf`

`smolstack convert-checkpoint ./adapter ./merged`
"""


def convert_checkpoint(
    model: options.ModelArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; complete or not at all.")
    ],
    *,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID",
            help="Tokenizer of a nanoVLM checkpoint, instead of its lm_tokenizer.",
        ),
    ] = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    revision: options.RevisionOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder of this family.

    Reads whatever smolstack loads (adapters are merged, MLX and GGUF weights become floats), and
    nanoVLM checkpoints.
    """
    check_new_folder(out, CheckpointError, overwrite=overwrite)
    with progress(f"Converting {model} …"):
        from smolstack.checkpoint.hub import find, locate
        from smolstack.checkpoint.unsupported import is_nanovlm, peek

        where = locate(model, revision, base=base, mmproj=mmproj)
        if is_nanovlm(peek(where.path / "config.json")):
            from smolstack.checkpoint.nanovlm import convert_nanovlm, tokenizer_of

            words = find(tokenizer or tokenizer_of(where.path), weights=False)
            convert_nanovlm(where.path, words, out, overwrite=overwrite)
        elif tokenizer is not None:
            raise ConfigError(
                f"--tokenizer applies to nanoVLM checkpoints only, which {model} is not"
            )
        else:
            _save(where, out, overwrite=overwrite)
    size = size_in_bytes(sum(file.stat().st_size for file in out.iterdir() if file.is_file()))
    show(f"{out}: {size}")


def _save(where: ModelPath, out: Path, *, overwrite: bool) -> None:
    """Whatever is loaded, in the number format that it is stored in, whatever this CPU prefers."""
    from smolstack.checkpoint.load import stored_dtype
    from smolstack.checkpoint.source import open_source
    from smolstack.vlm import load

    entries = open_source(where).entries
    whole = all(entry.format is None for entry in entries.values())
    dtype = str(stored_dtype(entries)).removeprefix("torch.") if whole else "auto"
    load(where, dtype=dtype).save(out, overwrite=overwrite)
