"""Reads the image arguments of a call for the packer, and converts a Batch for FMS's
``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smolstack.batch import Batch
from smolstack.errors import AlignmentError, GridError

# Image keywords; all other keywords of a call are for FMS's attention.
IMAGE_KEYS = (
    "pixel_values",
    "pixel_attention_mask",
    "tile_grids",
    "tiles_per_sequence",
    "visual_tokens",
)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a batch as one flat list.

    Attributes:
        pixels: (N, 3, P, P); per_sequence: tiles of each row; filled: (rows, columns) of patches
            that contain image, per tile, None if all are full.
    """

    pixels: Tensor
    per_sequence: tuple[int, ...]
    filled: tuple[tuple[int, int], ...] | None


def split_images(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keywords into image keywords and others; None and empty pixels count as absent."""
    images = {k: v for k, v in kwargs.items() if k in IMAGE_KEYS and v is not None}
    pixels = images.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.numel() == 0:
        images = {}
    return images, {k: v for k, v in kwargs.items() if k not in IMAGE_KEYS}


def read_tiles(
    pixel_values: Tensor,
    image_tokens: Sequence[int],
    tokens_per_tile: int,
    patch: int,
    *,
    pixel_attention_mask: Tensor | None = None,
    tile_grids: Sequence[tuple[int, int]] | None = None,
    tiles_per_sequence: Sequence[int] | None = None,
) -> Tiles:
    """Return the tiles of each row, without guessing from pixels which of them are padding.

    Args:
        pixel_values: (N, 3, P, P), the tiles of all rows one after another, or (B, most, 3, P, P)
            as from transformers' processors, in which rows with fewer tiles are padded.
        image_tokens: image tokens of each row.
        tokens_per_tile: S.
        patch: pixels of a patch's side.
        pixel_attention_mask: shape of pixel_values without channels; true where there is image.
        tile_grids: patches that contain image, per tile, instead of a mask.
        tiles_per_sequence: tiles of each row; default: from the mask or the image tokens.

    Raises:
        AlignmentError: tiles and image tokens do not match.
        GridError: a mask is not a rectangle from the top left.
    """
    if pixel_values.dim() not in (4, 5):
        raise GridError(
            f"pixel_values have shape {tuple(pixel_values.shape)}, expected (N, 3, P, P) or "
            "(B, tiles, 3, P, P)"
        )
    counts = [count // tokens_per_tile for count in image_tokens]
    if tiles_per_sequence is not None:
        counts = [int(count) for count in tiles_per_sequence]
    mask = pixel_attention_mask
    if pixel_values.dim() == 5:
        if mask is not None and tiles_per_sequence is None:
            real = mask.flatten(2).any(dim=2)
            counts = real.sum(dim=1).tolist()
        else:
            real = _slots(pixel_values, counts)
        pixel_values = pixel_values[real]
        mask = None if mask is None else mask[real]
    elif sum(counts) != pixel_values.shape[0]:
        raise AlignmentError(
            f"the image tokens need {counts} tiles per sequence, {sum(counts)} in total; "
            f"pixel_values contain {pixel_values.shape[0]}"
        )
    filled = None if tile_grids is None else tuple((int(r), int(c)) for r, c in tile_grids)
    if mask is not None and filled is None:
        filled = _filled(mask, patch)
    return Tiles(pixel_values, tuple(counts), filled)


def generation_inputs(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """Convert a smolstack Batch for ``fms.utils.generation.generate``: (input_ids, extra_kwargs).

    Positions and mask are included if rows are padded; FMS extends both token by token.
    """
    extra: dict[str, Any] = {"tiles_per_sequence": batch.tiles_per_sequence}
    if batch.visual_tokens is not None:
        extra["visual_tokens"] = batch.visual_tokens
    else:
        extra["pixel_values"] = batch.tiles
        extra["tile_grids"] = batch.tile_grids
    real = batch.attention_mask
    if not bool(real.all()):
        extra["mask"] = attention_mask(real, real.shape[1])
        extra["position_ids"] = positions(real, real.shape[1])
    return batch.token_ids, extra


def positions(real: Tensor, new: int) -> Tensor:
    """Return positions of the last ``new`` tokens, counting real tokens: (B, L) → (B, new)."""
    return (real.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new:]


def attention_mask(real: Tensor, new: int) -> Tensor:
    """Return the mask of the last ``new`` of L tokens: (B, L) bool → (B, new, L), 0 or -inf.

    A token attends to real tokens up to itself; padding attends to itself, so that no row is empty.
    """
    length = real.shape[1]
    keys = torch.arange(length, device=real.device)
    queries = keys[-new:, None]
    allowed = ((keys <= queries) & real.bool()[:, None]) | (keys == queries)
    return torch.zeros(allowed.shape, device=real.device).masked_fill(~allowed, float("-inf"))


def causal_again(mask: Tensor) -> Tensor:
    """Return the complete mask of L tokens, (B, L, L), from one whose last row is (B, 1, L).

    Without a cache, FMS's ``generate`` keeps only the last row between tokens, which would let
    every token attend to later ones.
    """
    return attention_mask(mask[:, -1] == 0, mask.shape[-1])


def _slots(pixels: Tensor, counts: Sequence[int]) -> Tensor:
    """Return which of the (B, most) tiles are real, bool: the first of each row; the rest must be
    0.
    """
    rows, most = pixels.shape[:2]
    if len(counts) != rows or max(counts, default=0) > most:
        raise AlignmentError(
            f"the image tokens of {len(counts)} sequences need {list(counts)} tiles; "
            f"pixel_values contain up to {most} for each of {rows}"
        )
    device = pixels.device
    real = torch.arange(most, device=device)[None] < torch.tensor(counts, device=device)[:, None]
    if bool(pixels[~real].any()):
        row, tile = (~real & pixels.flatten(2).any(dim=2)).nonzero()[0].tolist()
        raise AlignmentError(
            f"sequence {row} has pixels in tile {tile}, but its image tokens need {counts[row]} "
            "tiles"
        )
    return real


def _filled(mask: Tensor, patch: int) -> tuple[tuple[int, int], ...] | None:
    """Return the patches of each tile that contain image, from pixels (N, P, P); None if all do."""
    seen = mask.bool().unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).any(dim=3)
    if bool(seen.all()):
        return None
    rows, columns = seen.any(dim=2).sum(dim=1), seen.any(dim=1).sum(dim=1)
    corner = (torch.arange(seen.shape[1], device=mask.device)[:, None] < rows[:, None, None]) & (
        torch.arange(seen.shape[2], device=mask.device) < columns[:, None, None]
    )
    for index in (corner != seen).flatten(1).any(dim=1).nonzero().flatten().tolist():
        raise GridError(
            f"pixel_attention_mask of tile {index} is not a rectangle from the top left corner"
        )
    return tuple(zip(rows.tolist(), columns.tolist(), strict=True))
