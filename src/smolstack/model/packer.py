"""The packer: visual tokens take their places in the text sequence.

Locating and splicing are two steps. Everything is counted before anything is written, for every
row of the batch. It runs at prefill only: an image token that the model itself writes later is an
ordinary token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolstack.errors import AlignmentError


def locate(
    token_ids: Tensor,
    image_token_id: int,
    tiles_per_sequence: Sequence[int],
    tokens_per_tile: int,
) -> Tensor:
    """Places of visual tokens in the flattened batch, checked: (tiles · S,) int64.

    Args:
        token_ids: (B, T).
        image_token_id: the id that marks a place.
        tiles_per_sequence: tiles of each row, length B.
        tokens_per_tile: S; each run of places must hold whole tiles.

    Raises:
        AlignmentError: naming the row, the places found and those expected.
    """
    rows = token_ids.shape[0]
    if len(tiles_per_sequence) != rows:
        raise AlignmentError(f"tile counts for {len(tiles_per_sequence)} of {rows} sequences")
    places = token_ids == image_token_id
    found = places.sum(dim=1).tolist()
    for row, (count, tiles) in enumerate(zip(found, tiles_per_sequence, strict=True)):
        expected = tiles * tokens_per_tile
        if count != expected:
            raise AlignmentError(
                f"sequence {row} has {count} image tokens, expected {expected} "
                f"({tiles} tiles of {tokens_per_tile} visual tokens)"
            )
        _check_runs(row, places[row], tokens_per_tile)
    return places.flatten().nonzero().squeeze(1)


def _check_runs(row: int, places: Tensor, tokens_per_tile: int) -> None:
    """Each run of adjacent places in one row must be a whole number of tiles."""
    zero = torch.zeros(1, dtype=torch.long, device=places.device)
    edges = torch.diff(places.long(), prepend=zero, append=zero)
    starts = (edges == 1).nonzero().squeeze(1).tolist()
    ends = (edges == -1).nonzero().squeeze(1).tolist()
    for start, end in zip(starts, ends, strict=True):
        if (end - start) % tokens_per_tile:
            raise AlignmentError(
                f"sequence {row} has a run of {end - start} image tokens at position {start}, "
                f"expected a multiple of {tokens_per_tile}, the visual tokens of a tile"
            )


def splice(embeddings: Tensor, places: Tensor, visual_tokens: Tensor) -> Tensor:
    """Put visual tokens at their places: a new (B, T, D); the input is left as it is.

    Args:
        embeddings: (B, T, D) of the text tokens.
        places: (N·S,), from :func:`locate`.
        visual_tokens: (N, S, D) in reading order of the batch.

    Raises:
        AlignmentError: the widths or the numbers differ.
    """
    width = embeddings.shape[-1]
    if visual_tokens.shape[-1] != width:
        raise AlignmentError(
            f"visual tokens are {visual_tokens.shape[-1]} wide, text embeddings {width}"
        )
    flat = visual_tokens.reshape(-1, width).to(embeddings.dtype)
    if flat.shape[0] != places.shape[0]:
        raise AlignmentError(f"{flat.shape[0]} visual tokens for {places.shape[0]} places")
    merged = embeddings.reshape(-1, width).index_copy(0, places, flat)
    return merged.view(embeddings.shape)
