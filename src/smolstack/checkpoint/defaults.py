"""Derives keys that a folder leaves out from the rest of the folder.

transformers fills a missing key with its class's default. If the other files imply the same value,
the key is derived and a note is made. If the value would be a guess, the key stays missing, and the
code that needs it raises an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Class defaults of transformers 5.24: Idefics3ImageProcessor and Idefics3Config.
TILE_EDGE, LONGEST_EDGE = 364, 4 * 364
SCALE, IMAGE_TOKEN_ID = 2, 128257


def derive_image(
    config: Mapping[str, Any], image: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the image processor's settings with values implied by the vision tower, and notes.

    Idefics3-8B-Llama3 is published without ``max_image_size``: its tower sees tiles of 364 pixels,
    and 364 is transformers' default.
    """
    found, notes = dict(image), []
    vision = config.get("vision_config")
    seen = vision.get("image_size") if isinstance(vision, Mapping) else None
    if seen in (TILE_EDGE, [TILE_EDGE, TILE_EDGE]):
        if found.get("max_image_size") is None:
            found["max_image_size"] = {"longest_edge": TILE_EDGE}
            notes.append(
                f"the image processor's settings have no max_image_size; it is {TILE_EDGE}, the "
                "tower's image_size and transformers' default"
            )
        if found.get("size") is None and found["max_image_size"] == {"longest_edge": TILE_EDGE}:
            found["size"] = {"longest_edge": LONGEST_EDGE}
            notes.append(
                f"the image processor's settings have no size; it is {LONGEST_EDGE}, transformers' "
                f"default for tiles of {TILE_EDGE}"
            )
    return found, notes


def derive_config(
    config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer_json: bytes
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json with values implied by the processor and the tokenizer, and notes."""
    found, notes = dict(config), []
    if found.get("scale_factor") is None and _implied_scale(config, processor) == SCALE:
        found["scale_factor"] = SCALE
        notes.append(
            f"config.json has no scale_factor; it is {SCALE}, which processor_config.json's "
            "image_seq_len implies and transformers' default"
        )
    if found.get("image_token_id") is None and _image_token(tokenizer_json) == IMAGE_TOKEN_ID:
        found["image_token_id"] = IMAGE_TOKEN_ID
        notes.append(
            f"config.json has no image_token_id; it is {IMAGE_TOKEN_ID}, tokenizer.json's <image> "
            "and transformers' default"
        )
    return found, notes


def _implied_scale(config: Mapping[str, Any], processor: Mapping[str, Any]) -> int | None:
    """Return the scale that results in ``image_seq_len`` tokens per tile, if there is one."""
    vision, tokens = config.get("vision_config"), processor.get("image_seq_len")
    if not isinstance(vision, Mapping) or not isinstance(tokens, int):
        return None
    size, patch = vision.get("image_size"), vision.get("patch_size")
    if not isinstance(size, int) or not isinstance(patch, int) or patch < 1:
        return None
    side = size // patch
    scales = (scale for scale in range(1, side + 1) if side % scale == 0)
    return next((scale for scale in scales if (side // scale) ** 2 == tokens), None)


def _image_token(tokenizer_json: bytes) -> int | None:
    try:
        added = json.loads(tokenizer_json)["added_tokens"]
        return next((token["id"] for token in added if token["content"] == "<image>"), None)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # reading the tokenizer reports the error
