"""Images between file and visual tokens: their tiles wait for the vision tower."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from smolstack.processor.geometry import TilePlan
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import ImageSource, read_tiles


@dataclass(eq=False)
class PreparedImage:
    """An image that is not yet encoded.

    Attributes:
        key: key in the image cache.
        tiles: (n, 3, P, P) uint8; None if another request provides them.
        digests: digest of each tile.
    """

    key: bytes
    image: ImageSource
    plan: TilePlan
    tiles: Tensor | None = None
    digests: list[bytes] = field(default_factory=list)

    def cut(self, processor: Processor) -> None:
        """Open the image and cut its tiles. Thread-safe.

        Raises:
            ImageError: the image cannot be decoded.
        """
        tiles = read_tiles(self.image, self.plan, processor.settings)
        self.digests = [hashlib.sha256(tile.numpy().data).digest() for tile in tiles]
        self.tiles = tiles


@dataclass(eq=False)
class PendingTile:
    """A tile, shared by all images that contain it.

    Attributes:
        pixels: (3, P, P) uint8.
        visual: (S, D) once encoded.
    """

    pixels: Tensor
    visual: Tensor | None = None
