"""Opens a plain SigLIP folder as a vision tower: SiglipVisionModel, or SiglipModel's vision
encoder.

SigLIP 2 with fixed resolution uses the same classes. The pooling head and the text encoder are not
used: a connector reads the patch states after the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smolstack.checkpoint import keys
from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.files import read_json
from smolstack.checkpoint.source import chosen
from smolstack.checkpoint.tower import VisionSource, matching, refuse_other_weights, without
from smolstack.checkpoint.unsupported import refuse_other_kinds
from smolstack.checkpoint.weights import read_entries, read_tensors
from smolstack.config import SIGLIP_DEFAULTS, VisionConfig
from smolstack.model.vision import VisionTower
from smolstack.processor.settings import ImageSettings

MODEL_TYPES = ("siglip", "siglip_vision_model")
TILES_ALONG = 4  # tiles along the longer side, as in the published models of the family
_PREFIX, _PATCHES = "vision_model.", "embeddings.patch_embedding.weight"
# SiglipImageProcessor's defaults; resample 3 is bicubic.
_IMAGE = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def open_siglip(folder: Path) -> VisionSource:
    """Open the vision tower in a SigLIP folder; weights stay on disk.

    Raises:
        CheckpointError, ConfigError: naming file, key, what was found and what was expected.
    """
    refuse_other_kinds(folder)
    data = read_json(folder / "config.json")
    refuse_other_weights(folder, data)
    inner = data.get("vision_config")
    where = f"{folder / 'config.json'}{' vision_config' if isinstance(inner, Mapping) else ''}"
    own = inner if isinstance(inner, Mapping) else data
    config = VisionConfig.from_hf(own, where, SIGLIP_DEFAULTS)
    entries = read_entries(folder)
    prefix = _PREFIX if f"{_PREFIX}{_PATCHES}" in entries else ""
    stored = Stored(folder, entries, lambda names: read_tensors(folder, chosen(entries, names)))
    left_out = sorted({_part(name, prefix) for name in entries if _unused(name, prefix)})
    notes = [f"{folder}: left out {', '.join(left_out)}, which no connector reads"]
    with torch.device("meta"):
        tower = VisionTower(config)
    expected = {f"vision.{name}": tensor for name, tensor in tower.state_dict().items()}

    def theirs(name: str) -> str:
        return prefix + keys.to_hf(name).removeprefix("model.vision_model.")

    kept = without(stored, lambda name: _unused(name, prefix))
    read, dtype = matching(folder, expected, kept, theirs)
    settings, more = _settings(folder, config)
    return VisionSource(
        folder, config, settings, None, read, dtype, (*(notes if left_out else []), *more)
    )


def _unused(name: str, prefix: str) -> bool:
    """Return whether a weight belongs to the pooling head, the text encoder or a classifier."""
    if not name.startswith(prefix):
        return True
    own = name.removeprefix(prefix)
    return own.startswith("head.") or own == "embeddings.position_ids"


def _part(name: str, prefix: str) -> str:
    """Return the name of a weight's part of the SigLIP model, for notes."""
    if name.startswith(prefix):
        return "position ids" if name.endswith("position_ids") else "the pooling head"
    first = name.partition(".")[0]
    return "the text tower" if first == "text_model" else first


def _settings(folder: Path, config: VisionConfig) -> tuple[ImageSettings, list[str]]:
    """Return the preprocessing settings: the checkpoint's mean, deviation and filter, and tiles of
    its image size.
    """
    found: dict[str, Any] = {}
    notes = []
    if (folder / "preprocessor_config.json").is_file():
        found = read_json(folder / "preprocessor_config.json")
    else:
        notes.append(
            f"{folder} has no preprocessor_config.json; images are prepared as "
            "SiglipImageProcessor does by default: bicubic, mean and deviation 0.5"
        )
    edge = config.image_size
    size = found.get("size")
    seen = size.get("height") if isinstance(size, Mapping) else size
    if seen is not None and seen != edge:
        notes.append(
            f"{folder}: preprocessor_config.json resizes to {seen!r:.40} pixels, the tower's "
            f"image_size is {edge}; tiles have {edge}"
        )
    given = {key: value for key, value in found.items() if value is not None}
    data = {
        **_IMAGE,
        **given,
        "do_resize": True,
        "do_image_splitting": True,
        "size": {"longest_edge": TILES_ALONG * edge},
        "max_image_size": {"longest_edge": edge},
    }
    return ImageSettings.from_hf(data), notes
