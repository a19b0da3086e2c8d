"""Batch: the interface between the processor and the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens, padded on the left, and the N tiles of all their images.

    Attributes:
        token_ids: (B, T) int64. Positions of visual tokens hold the image token's id.
        attention_mask: (B, T) bool, False on padding.
        tiles: (N, 3, P, P) normalized pixels, a flat list over the whole batch in reading order
            (sequence by sequence, image by image, tile by tile). There are no padding tiles.
        tiles_per_image: tiles of each image, in the same order; sums to N (if visual tokens
            are given instead, to the tiles they came from).
        images_per_sequence: images of each sequence; has length B.
        tile_grids: for partly filled tiles, the (rows, columns) of patches that contain image,
            one pair per tile; None if every tile is full.
        visual_tokens: (N, S, D), the connector's output for ``tiles`` if already computed
            (then ``tiles`` may be empty); None otherwise.
    """

    token_ids: Tensor
    attention_mask: Tensor
    tiles: Tensor
    tiles_per_image: tuple[int, ...] = ()
    images_per_sequence: tuple[int, ...] = ()
    tile_grids: tuple[tuple[int, int], ...] | None = None
    visual_tokens: Tensor | None = None

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @property
    def tiles_per_sequence(self) -> tuple[int, ...]:
        """Tiles of each sequence, length B."""
        counts, start = [], 0
        for images in self.images_per_sequence:
            counts.append(sum(self.tiles_per_image[start : start + images]))
            start += images
        return tuple(counts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move the batch to ``device`` and convert its pixels and visual tokens to ``dtype``."""
        visual = self.visual_tokens
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            tiles=self.tiles.to(device=device, dtype=dtype),
            visual_tokens=None if visual is None else visual.to(device=device, dtype=dtype),
        )


@dataclass(frozen=True)
class VisualTokens:
    """One image after tower and connector, as returned by :meth:`smolstack.VLM.encode`.

    Attributes:
        tokens: (n, S, D) for its n tiles, the whole image last.
        rows, cols: its grid of tiles, 0 and 0 if it was not split.
        source: (width, height) of the image.
        key: a digest of the input that the tokens were computed from; None for tokens created in
            another way, and for copies with other tokens (``replace``).
    """

    tokens: Tensor
    rows: int
    cols: int
    source: tuple[int, int]
    key: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def keyed(self, key: bytes) -> VisualTokens:
        """Return the same visual tokens with ``key`` set."""
        object.__setattr__(self, "key", key)
        return self

    def __len__(self) -> int:
        """Number of visual tokens: n · S."""
        return self.tokens.shape[0] * self.tokens.shape[1]
