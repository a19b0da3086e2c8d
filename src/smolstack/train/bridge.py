"""A new bridge between two towers: one checkpoint's eyes, another's words, a connector to train."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from smolstack.checkpoint.hub import find
from smolstack.checkpoint.load import Checkpoint, load_checkpoint
from smolstack.checkpoint.save import complete_side_files, save_checkpoint, to_json
from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel


def bridge_towers(
    vision: str | Path | None,
    text: str | Path | None,
    folder: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of one's vision tower and another's text tower, not yet acquainted.

    The connector between them is random, at a scale that makes visual tokens as long as the text
    tower's own words on average; a "connector" stage then trains it.

    Args:
        vision: the checkpoint that gives vision tower, scale and preprocessing; None is the
            bundled reader.
        text: the one that gives decoder, head, tokenizer and chat template.
        folder: where to write; must not exist or be empty, unless ``overwrite``.
        seed: of the connector.

    Raises:
        ConfigError, CheckpointError: a checkpoint cannot be read, or the text one gives no answers.
    """
    eyes, words = _load(vision), _load(text)
    if words.config.embedding_dim is not None:
        raise ConfigError(f"{text} ends in an embedding head; it has no words to answer in")
    config = replace(words.config, vision=eyes.config.vision, scale=eyes.config.scale)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    state = {
        **{f"vision.{n}": t for n, t in eyes.model.vision.state_dict().items()},
        **{n: t for n, t in words.model.state_dict().items() if not _of_eyes(n)},
        "connector.proj.weight": _fresh_projection(model, words.model, seed),
    }
    model.load_state_dict(state, strict=True, assign=True)
    side = dict(complete_side_files(words.files, config, eyes.processor.settings))
    # The text's own files may describe its former eyes.
    processor_class = words.files.processor.get("processor_class", "Idefics3Processor")
    tiles = eyes.processor.settings.tile_edge // config.vision.patch_size // config.scale
    side["preprocessor_config.json"] = to_json(
        eyes.processor.settings.to_hf(str(processor_class))
    ).encode()
    side["processor_config.json"] = to_json(
        {"processor_class": processor_class, "image_seq_len": tiles**2}
    ).encode()
    return save_checkpoint(folder, model, side, overwrite=overwrite)


def _load(model: str | Path | None) -> Checkpoint:
    return load_checkpoint(find(model, None), "float32", "cpu")


def _of_eyes(name: str) -> bool:
    return name.startswith(("vision.", "connector."))


def _fresh_projection(
    model: VisionLanguageModel, words: VisionLanguageModel, seed: int
) -> torch.Tensor:
    """Noise at the scale of the words: the tower's last norm makes its states about 1 in size."""
    rows, columns = model.connector.proj.weight.shape
    size = float(words.decoder.embedding.weight.detach().square().mean().sqrt())
    generator = torch.Generator().manual_seed(seed)
    noise: torch.Tensor = torch.randn(rows, columns, generator=generator) * size
    return noise / math.sqrt(columns)
