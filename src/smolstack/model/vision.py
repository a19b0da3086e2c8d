"""The vision tower: a SigLIP encoder that maps a tile of pixels to a grid of patch states.

Shapes: N tiles of P×P pixels, H×W patches of p×p pixels, C the hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.config import VisionConfig
from smolstack.errors import GridError
from smolstack.model.backend import TORCH, Backend
from smolstack.model.hooks import globally_hooked, is_hooked
from smolstack.model.layers import ACTIVATION, Embedding, merge_heads, split_heads


def position_ids(rows: int, columns: int, side: int) -> Tensor:
    """Indices into the side×side position embedding table for a rows×columns grid: (rows·columns,).

    A grid smaller than the table is spread over it: patch i of n uses row i·side // n, in integer
    arithmetic, so a full grid is the identity (NaViT's fractional positions, Dehghani et al. 2023,
    as quantized by Idefics2).
    """
    row = torch.arange(rows) * side // rows
    column = torch.arange(columns) * side // columns
    return (row[:, None] * side + column[None, :]).flatten()


class VisionAttention(nn.Module):
    """Multi-head self-attention over all patches of a tile, with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query = split_heads(self.query(x), self.num_heads)
        key = split_heads(self.key(x), self.num_heads)
        value = split_heads(self.value(x), self.num_heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(merge_heads(mixed))
        return out


class VisionLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.activation = ACTIVATION[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        out: Tensor = x + self.down(self.activation(self.up(self.mlp_norm(x))))
        return out


class VisionTower(nn.Module):
    """Patch embedding, position embedding, layers, final norm: (N, 3, P, P) → (N, H·W, C)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.position_embedding = Embedding(config.side**2, width)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.backend: Backend = TORCH

    def grid_of(self, tiles: Tensor) -> tuple[int, int]:
        """Return the patch grid (H, W) for tiles of this size; leftover pixels are ignored."""
        patch = self.config.patch_size
        return tiles.shape[-2] // patch, tiles.shape[-1] // patch

    def forward(self, tiles: Tensor, filled: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Compute patch states.

        Args:
            tiles: (N, 3, P, P) normalized pixels. Tiles smaller than the config's image_size and
                non-square tiles are supported: their positions are spread over the table.
            filled: for each tile the (rows, columns) of patches, from the top left, that contain
                image; the others are padding and masked out. None is the fast path: every tile
                is full, so there is no mask and positions are constant.

        Returns:
            (N, H·W, C). States of padding patches are defined but carry no image content.

        Raises:
            GridError: wrong number of channels, or a grid that does not fit.
        """
        self._check(tiles, filled)
        if filled is None:
            mask = None
            x = self.embed(tiles)
        else:
            x = self.patches(tiles)
            rows, columns = self.grid_of(tiles)
            ids, seen = _partial_positions(rows, columns, self.config.side, filled)
            x = x + self.position_embedding(ids.to(tiles.device))
            mask = seen[:, None, None, :].to(tiles.device)
        encoded = None
        if mask is None and not torch.compiler.is_compiling():
            encoded = self.backend.encode(self.layers, self.config, x)
        if encoded is None:
            for layer in self.layers:
                x = layer(x, mask)
            encoded = x
        out: Tensor = self.norm(encoded)
        return out

    def embed(self, tiles: Tensor) -> Tensor:
        """Compute the first layer's input for full tiles: (N, 3, P, P) → (N, H·W, C)."""
        rows, columns = self.grid_of(tiles)
        position_ids = self._full_positions(rows, columns, tiles.device)
        out: Tensor = self.patches(tiles) + self.position_embedding(position_ids)
        return out

    def patches(self, tiles: Tensor) -> Tensor:
        """Patch embedding without positions, as one matrix product: (N, 3, P, P) → (N, H·W, C).

        Equivalent to the strided convolution whose weights the checkpoint stores, which is called
        itself if it was replaced or has a hook.
        """
        if _is_modified(self.patch_embedding):
            called: Tensor = self.patch_embedding(tiles)
            return called.flatten(2).transpose(1, 2)
        size = self.config.patch_size
        rows, columns = self.grid_of(tiles)
        cropped = tiles[..., : rows * size, : columns * size]
        # "N c (H y) (W x) -> N (H W) (c y x)"
        folded = cropped.reshape(tiles.shape[0], tiles.shape[1], rows, size, columns, size)
        folded = folded.permute(0, 2, 4, 1, 3, 5).reshape(tiles.shape[0], rows * columns, -1)
        weight = self.patch_embedding.weight
        return functional.linear(folded, weight.flatten(1), self.patch_embedding.bias)

    def _full_positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        return position_ids(rows, columns, self.config.side).to(device)

    def _check(self, tiles: Tensor, filled: Sequence[tuple[int, int]] | None) -> None:
        if tiles.dim() != 4 or tiles.shape[1] != self.config.num_channels:
            raise GridError(
                f"tiles have shape {tuple(tiles.shape)}, expected "
                f"(N, {self.config.num_channels}, P, P)"
            )
        rows, columns = self.grid_of(tiles)
        if not (1 <= rows <= self.config.side and 1 <= columns <= self.config.side):
            raise GridError(
                f"tiles of {tiles.shape[-2]}x{tiles.shape[-1]} pixels give a {rows}x{columns} "
                f"patch grid; the tower's table holds {self.config.side}x{self.config.side}"
            )
        if filled is None:
            return
        if len(filled) != tiles.shape[0]:
            raise GridError(f"{len(filled)} filled grids for {tiles.shape[0]} tiles")
        for index, (high, wide) in enumerate(filled):
            if not (1 <= high <= rows and 1 <= wide <= columns):
                raise GridError(
                    f"tile {index} is filled by {high}x{wide} patches, its grid is {rows}x{columns}"
                )


def _is_modified(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d:
        return True
    return not torch.compiler.is_compiling() and (globally_hooked() or is_hooked(layer))


def _partial_positions(
    rows: int, columns: int, side: int, filled: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Return position ids (N, H·W) and a mask of patches with image (N, H·W); padding has id 0."""
    ids = torch.zeros(len(filled), rows, columns, dtype=torch.long)
    seen = torch.zeros(len(filled), rows, columns, dtype=torch.bool)
    for index, (high, wide) in enumerate(filled):
        ids[index, :high, :wide] = position_ids(high, wide, side).view(high, wide)
        seen[index, :high, :wide] = True
    return ids.flatten(1), seen.flatten(1)
