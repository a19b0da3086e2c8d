"""Merges visual tokens inside a traced graph, without depending on tensor values.

The eager code counts image tokens and tiles as Python numbers and encodes equal tiles once. Under
torch.compile that would break the graph, so here every tile is encoded, each image token is looked
up by its rank among the image tokens, and counts are checked by assertions inside the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def merge_traced(
    model: Any,
    input_ids: Tensor,
    *,
    pixel_values: Tensor | None = None,
    visual_tokens: Tensor | None = None,
    pixel_attention_mask: Tensor | None = None,
    tile_grids: Sequence[tuple[int, int]] | None = None,
    tiles_per_sequence: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return text embeddings with visual tokens merged in: (B, T) → (B, T, D).

    The arguments are those of :meth:`Idefics3.merge`. If pixels and image tokens do not match, the
    compiled graph raises a RuntimeError with the total, not the row.
    """
    image = input_ids == model.config.image_token_id
    rank = image.long().flatten().cumsum(0).view(image.shape) - 1
    padded = pixel_values is not None and pixel_values.dim() == 5
    if visual_tokens is None:
        assert pixel_values is not None
        visual_tokens = _encoded(model, pixel_values, pixel_attention_mask, tile_grids)
    count, per_tile, width = visual_tokens.shape
    if padded:
        assert pixel_values is not None
        held = image.sum(dim=1, keepdim=True)
        first = torch.arange(image.shape[0], device=image.device)[:, None]
        before = held.cumsum(dim=0) - held
        rank = rank - before + first * pixel_values.shape[1] * per_tile
        torch._assert_async(
            (held <= pixel_values.shape[1] * per_tile).all(), "more image tokens than pixel_values"
        )
    else:
        torch._assert_async(
            image.sum() == count * per_tile, "image tokens and pixel_values differ in number"
        )
    if tiles_per_sequence is not None:
        told = torch.as_tensor(tiles_per_sequence, device=image.device)
        torch._assert_async(
            (image.sum(dim=1) == told * per_tile).all(),
            "image tokens and tiles_per_sequence differ in number",
        )
    found = visual_tokens.reshape(-1, width)[rank.clamp(0, count * per_tile - 1)]
    text = model.embedding(input_ids)
    return torch.where(image[..., None], found.to(text), text)


def _encoded(
    model: Any,
    pixels: Tensor,
    mask: Tensor | None,
    grids: Sequence[tuple[int, int]] | None,
) -> Tensor:
    """Return visual tokens of every tile, including padding: (N, S, D)."""
    tiles = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
    grid = model.vision_tower.grid_of(tiles)
    seen = None
    if mask is not None and grids is None:
        patch = model.config.vision_config.patch_size
        whole = mask.bool().flatten(0, 1) if mask.dim() == 4 else mask.bool()
        seen = whole.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).any(dim=3)
        # A padding tile has no patches, so its attention would have no keys: it is read as a full
        # tile.
        seen = seen | ~seen.flatten(1).any(dim=1)[:, None, None]
    states = model.vision_tower(tiles, grids, seen)
    visual: Tensor = model.connector(states, grid)
    return visual
