"""Loads the model that a command's options describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smolstack.cli.options import Dtype
from smolstack.errors import ConfigError
from smolstack.output_files import check_folder

if TYPE_CHECKING:
    from smolstack.vlm import VLM


def load_model(
    model: str | None,
    revision: str | None,
    dtype: Dtype,
    device: str,
    threads: int | None,
    *,
    base: str | None = None,
    mmproj: Path | None = None,
    images: Path | None = None,
) -> VLM:
    """Load a checkpoint according to the options, with a spinner."""
    from smolstack.cli.console import progress

    if images is not None:
        check_folder(images, "--image-cache", ConfigError)
    with progress(f"Loading {model or 'the bundled reader'} …") as told:
        import torch

        from smolstack.vlm import load

        if threads is not None:
            torch.set_num_threads(threads)
        vlm = load(
            model,
            dtype=dtype.value,
            device=device,
            revision=revision,
            base=base,
            mmproj=mmproj,
            progress=told,
        )
    vlm.image_cache.folder = images
    return vlm
