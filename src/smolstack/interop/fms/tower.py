"""FMS's SigLIP tower for tiles of any size, including partly filled ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fms.models.siglip_vision import SiglipVisionHeadless
from torch import Tensor

from smolstack.errors import GridError
from smolstack.model.vision import position_ids


class VisionTower(SiglipVisionHeadless):  # type: ignore[misc]
    """FMS's modules and weights; FMS's forward pass supports only full tiles."""

    def grid_of(self, tiles: Tensor) -> tuple[int, int]:
        """Return (H, W), the patches that fit into tiles of this size."""
        patch: int = self.config.patch_size
        return tiles.shape[-2] // patch, tiles.shape[-1] // patch

    def forward(
        self,
        tiles: Tensor,
        filled: Sequence[tuple[int, int]] | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Return patch states: (N, 3, P, P) → (N, H·W, C).

        Args:
            tiles: normalized pixels, in any dtype.
            filled: (rows, columns) of patches that contain image, per tile; None if all do.
            seen: the same as booleans (N, H, W), a rectangle from the top left of each tile;
                supports tracing.

        Raises:
            GridError: the grid is larger than the position table.
        """
        rows, columns = self.grid_of(tiles)
        side = self.config.image_size // self.config.patch_size
        if not (1 <= rows <= side and 1 <= columns <= side):
            raise GridError(
                f"tiles of {tiles.shape[-2]}x{tiles.shape[-1]} pixels give a {rows}x{columns} "
                f"patch grid; the tower's table holds {side}x{side}"
            )
        attention: dict[str, Tensor] = {}
        if seen is not None:
            ids = _spread(seen, side)
            attention["mask"] = seen.flatten(1)[:, None]
        elif filled is None:
            ids = position_ids(rows, columns, side)[None]
        else:
            ids, held = _partial(rows, columns, side, filled)
            attention["mask"] = held[:, None].to(tiles.device)
        embed = self.embeddings.patch_embedding
        x = embed(tiles.to(embed.weight)).flatten(2).transpose(1, 2)
        x = x + self.embeddings.position_embedding(ids.to(tiles.device))
        x, _ = self.encoder(inputs_embeds=x, **attention)
        states: Tensor = self.post_layernorm(x)
        return states

    def reset_parameters(self) -> None:
        """Initialize with random weights, as FMS does for each part (FMS's own method recurses
        endlessly).
        """
        self.embeddings.reset_parameters()
        self.encoder.reset_parameters()
        self.post_layernorm.reset_parameters()


def _spread(seen: Tensor, side: int) -> Tensor:
    """Return position ids (N, H·W) of tiles whose filled patches are true in ``seen``, (N, H,
    W).
    """
    high, wide = seen.any(dim=2).sum(dim=1), seen.any(dim=1).sum(dim=1)
    rows = torch.arange(seen.shape[1], device=seen.device) * side // high[:, None]
    columns = torch.arange(seen.shape[2], device=seen.device) * side // wide[:, None]
    ids = rows[:, :, None] * side + columns[:, None, :]
    return torch.where(seen, ids, 0).flatten(1)


def _partial(
    rows: int, columns: int, side: int, filled: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Return position ids (N, H·W) of partly filled tiles, and which patches contain image (N,
    H·W).
    """
    ids = torch.zeros(len(filled), rows, columns, dtype=torch.long)
    seen = torch.zeros(len(filled), rows, columns, dtype=torch.bool)
    for index, (high, wide) in enumerate(filled):
        ids[index, :high, :wide] = position_ids(high, wide, side).view(high, wide)
        seen[index, :high, :wide] = True
    return ids.flatten(1), seen.flatten(1)
