"""Images between their file and their visual tokens: tiles that are cut and wait for the tower."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from smolstack.processor.geometry import TilePlan
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import ImageSource, read_tiles


@dataclass(eq=False)
class PreparedImage:
    """An image that is not encoded yet.

    Attributes:
        key: of the image cache.
        tiles: (n, 3, P, P) uint8; None where another request brought them.
        digests: of each tile.
    """

    key: bytes
    image: ImageSource
    plan: TilePlan
    tiles: Tensor | None = None
    digests: list[bytes] = field(default_factory=list)

    def cut(self, processor: Processor) -> None:
        """Open the image and cut its tiles. Safe in any thread.

        Raises:
            ImageError: the image cannot be decoded.
        """
        tiles = read_tiles(self.image, self.plan, processor.settings)
        self.digests = [hashlib.sha256(tile.numpy().data).digest() for tile in tiles]
        self.tiles = tiles


@dataclass(eq=False)
class PendingTile:
    """A tile that some images have in common.

    Attributes:
        pixels: (3, P, P) uint8.
        visual: (S, D) once it is encoded.
    """

    pixels: Tensor
    visual: Tensor | None = None
