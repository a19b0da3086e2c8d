"""Idefics3Connector: projects the vision tower's patch grid to the text hidden size.

Shapes (docs/shapes.md): B tiles, H×W the patch grid, C the vision hidden size, s the scale, D the
text hidden size, S = (H/s)·(W/s) visual tokens per tile.
"""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from smolstack.config import ModelConfig
from smolstack.errors import GridError


class Idefics3Connector(nn.Module):
    """Fold each s×s block of patches into the channels, then project to the text width.

    The projection has no bias. ``scale`` belongs to the checkpoint: use :meth:`from_config` rather
    than the default, which is SmolVLM-256M's (a 32×32 grid becomes 8×8, 12,288 becomes 576).

    Args:
        vision_hidden: C, channels of one patch.
        text_hidden: D, channels of one visual token.
        scale: s, edge of the block of patches that becomes one visual token.
    """

    def __init__(self, vision_hidden: int = 768, text_hidden: int = 576, scale: int = 4) -> None:
        super().__init__()
        sizes = {"vision_hidden": vision_hidden, "text_hidden": text_hidden, "scale": scale}
        for name, size in sizes.items():
            _check_integer(name, size)
        if min(vision_hidden, text_hidden, scale) < 1:
            raise GridError(
                f"connector sizes must be positive: vision_hidden {vision_hidden}, "
                f"text_hidden {text_hidden}, scale {scale}"
            )
        self.vision_hidden, self.text_hidden, self.scale = vision_hidden, text_hidden, scale
        self.proj = nn.Linear(scale * scale * vision_hidden, text_hidden, bias=False)

    @classmethod
    def from_config(cls, config: ModelConfig) -> Idefics3Connector:
        """Build the connector of a checkpoint, with the scale from its config."""
        return cls(config.vision.hidden_size, config.text.hidden_size, config.scale)

    @staticmethod
    def pixel_unshuffle(patches: Tensor, scale: int, grid: tuple[int, int] | None = None) -> Tensor:
        """Concatenate the s² patch embeddings of each block: (B, H·W, C) → (B, S, s²·C).

        Output tokens are in row-major order; feature ``(dy·s + dx)·C + c`` of a token is channel
        c of the patch at row dy, column dx of its block. (``F.unfold`` and ``nn.PixelUnshuffle``
        put the channel first, an order that no checkpoint of this family has.) The blocks are
        taken as a view; flattening them makes the one copy.

        Args:
            patches: (B, H·W, C), row-major patches.
            scale: s, which must divide H and W.
            grid: (H, W); None means a square grid.

        Raises:
            GridError: the patches do not form that grid, or s does not divide it.
        """
        if patches.dim() != 3:
            raise GridError(
                f"patches have shape {tuple(patches.shape)}, expected 3 axes (B, H*W, C)"
            )
        _check_integer("scale", scale)
        height, width = _grid_of(patches.shape[1], grid)
        if scale < 1:
            raise GridError(f"scale is {scale}, expected a positive integer")
        if height % scale or width % scale:
            raise GridError(f"scale {scale} does not divide the patch grid {height}x{width}")
        batch, _, channels = patches.shape
        image = patches.reshape(batch, height, width, channels)
        # (B, H, W, C) -> (B, H/s, W/s, C, dy, dx): a view
        blocks = image.unfold(1, scale, scale).unfold(2, scale, scale)
        blocks = blocks.permute(0, 1, 2, 4, 5, 3)
        tokens = (height // scale) * (width // scale)
        return blocks.reshape(batch, tokens, scale * scale * channels)

    def forward(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Visual tokens: (B, H·W, C) → (B, S, D).

        Raises:
            GridError: as :meth:`pixel_unshuffle`, or the channels are not ``vision_hidden``.
        """
        if patches.shape[-1] != self.vision_hidden:
            raise GridError(
                f"patches have {patches.shape[-1]} channels; a connector of {self.vision_hidden} "
                f"channels at scale {self.scale} projects {self.proj.in_features} features"
            )
        projected: Tensor = self.proj(self.pixel_unshuffle(patches, self.scale, grid))
        return projected

    def extra_repr(self) -> str:
        return f"{self.vision_hidden} -> {self.text_hidden}, scale={self.scale}"


def _check_integer(name: str, value: object) -> None:
    """Reject non-integers: 4.0 would pass every comparison and fail in a reshape."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise GridError(f"{name} is {value!r}, expected an integer")


def _grid_of(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return the validated grid (H, W) for ``count`` patches."""
    if grid is not None:
        height, width = grid
        _check_integer("the grid's height", height)
        _check_integer("the grid's width", width)
        if height < 1 or width < 1 or height * width != count:
            raise GridError(f"grid {height}x{width} has {height * width} patches, found {count}")
        return height, width
    side = _root_of(count)
    if side * side != count or side == 0:
        raise GridError(f"{count} patches do not form a square grid; pass grid=(rows, columns)")
    return side, side


def _root_of(count: int) -> int:
    """Return the square root, rounded down.

    When a graph is traced with dynamic shapes, ``count`` is a symbol, which supports powers but not
    ``math.isqrt``. Square roots of perfect squares below 2**52 are exact in float64.
    """
    if torch.compiler.is_compiling() or isinstance(count, torch.SymInt):
        return int(count**0.5)
    return math.isqrt(count)
