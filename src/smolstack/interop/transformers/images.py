"""Encoded images in transformers' form, and merging them into embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from smolstack.model import packer
from smolstack.model.tile_passes import TILES_AT_ONCE
from smolstack.model.vlm import VisionLanguageModel

# Typed as Any: transformers is only partly annotated.
Pooled: Any = BaseModelOutputWithPooling


def image_outputs(mm_encoder_outputs: Any) -> Any:
    """Return previously encoded images, in any accepted form, as transformers returns them."""
    if isinstance(mm_encoder_outputs, dict):
        return mm_encoder_outputs.get("image")
    if isinstance(mm_encoder_outputs, Tensor):
        return Pooled(pooler_output=[mm_encoder_outputs.flatten(0, -2)])
    return mm_encoder_outputs


def encode(
    engine: VisionLanguageModel, tiles: Tensor, filled: list[tuple[int, int]] | None
) -> tuple[Tensor, Tensor]:
    """Return patch states (N, H·W, C) and visual tokens (N, S, D), a few tiles at a time."""
    grid = engine.vision.grid_of(tiles)
    states, visual = [], []
    for start in range(0, len(tiles), TILES_AT_ONCE):
        some = slice(start, start + TILES_AT_ONCE)
        states.append(engine.vision(tiles[some], None if filled is None else filled[some]))
        visual.append(engine.connector(states[-1], grid))
    if not states:
        width, tokens = engine.config.text.hidden_size, engine.config.tokens_per_tile
        return tiles.new_zeros(0, grid[0] * grid[1], 0), tiles.new_zeros(0, tokens, width)
    return torch.cat(states), torch.cat(visual)


def embed(
    engine: VisionLanguageModel,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    outputs: Any,
) -> Tensor:
    """Return embeddings of all tokens (B, T, D) with visual tokens merged in, counted per row."""
    if input_ids is None:
        assert inputs_embeds is not None
        return inputs_embeds
    embeddings: Tensor = engine.decoder.embedding(input_ids)
    if outputs is None:
        return embeddings
    pooled = outputs.pooler_output
    pooled = [pooled.flatten(0, -2)] if isinstance(pooled, Tensor) else list(pooled)
    visual = torch.cat(pooled)
    # Each image token counts as a tile of one token: only counts per row are known here.
    counts = [len(part) for part in pooled]
    if len(counts) != len(input_ids):
        counts = (input_ids == engine.config.image_token_id).sum(dim=1).tolist()
    positions = packer.locate(input_ids, engine.config.image_token_id, counts, 1)
    return packer.splice(embeddings, positions, visual[:, None])
