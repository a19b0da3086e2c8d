"""Images waiting for the vision tower: tiles of several requests share a forward pass."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.generation.image_cache import ImageCache
from smolstack.generation.prepared_image import PendingTile, PreparedImage
from smolstack.generation.request import Request
from smolstack.processor.geometry import TilePlan
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import ImageSource


@dataclass(eq=False)
class _Image:
    plan: TilePlan
    tiles: list[PendingTile]
    waiting: set[Request] = field(default_factory=set)

    @property
    def rank(self) -> float:
        """Return the rank of the most urgent request that waits for it."""
        return min((r.rank for r in self.waiting if not r.held), default=math.inf)

    @property
    def complete(self) -> bool:
        return all(tile.visual is not None for tile in self.tiles)


class ImageQueue:
    """The images that requests wait for. Each image, and each of several bit-identical tiles (such
    as the white of pages), is encoded once.

    Attributes:
        tiles_done: tiles encoded.
        images_done: images encoded.
    """

    def __init__(self, processor: Processor, cache: ImageCache) -> None:
        self.processor, self.cache = processor, cache
        self.tiles_done = self.images_done = 0
        self._images: OrderedDict[bytes, _Image] = OrderedDict()
        self._tiles: WeakValueDictionary[bytes, PendingTile] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._images)

    def key(self, image: ImageSource, plan: TilePlan) -> bytes:
        """Return an image's key in the image cache."""
        return self.cache.key(image, plan, self.processor.settings)

    def prepare(
        self, image: ImageSource, plan: TilePlan, key: bytes | None = None
    ) -> VisualTokens | PreparedImage:
        """Return an image's visual tokens if cached, else its tiles. Thread-safe.

        Args:
            key: the result of :meth:`key`, if known.

        Raises:
            ImageError: the image cannot be decoded.
        """
        key = self.key(image, plan) if key is None else key
        known = self.cache.get(key)
        if known is not None:
            return known
        prepared = PreparedImage(key, image, plan)
        if key not in self._images:
            prepared.cut(self.processor)
        return prepared

    def add(self, prepared: PreparedImage, request: Request) -> VisualTokens | None:
        """Let a request wait for an image; return its visual tokens if they are already
        available.
        """
        if prepared.key not in self._images:
            known = self.cache.get(prepared.key)
            if known is not None:
                return known
            if prepared.tiles is None:  # the request that provided them has left
                prepared.cut(self.processor)
            assert prepared.tiles is not None
            pairs = zip(prepared.digests, prepared.tiles, strict=True)
            tiles = [self._tile(digest, pixels) for digest, pixels in pairs]
            self._images[prepared.key] = _Image(prepared.plan, tiles)
        self._images[prepared.key].waiting.add(request)
        return None

    def _tile(self, digest: bytes, pixels: Tensor) -> PendingTile:
        tile = self._tiles.get(digest)
        if tile is None:
            tile = self._tiles[digest] = PendingTile(pixels)
        return tile

    def leave(self, request: Request) -> None:
        """Remove a request; images that no request waits for are dropped."""
        for key, image in list(self._images.items()):
            image.waiting.discard(request)
            if not image.waiting:
                del self._images[key]

    @property
    def rank(self) -> float | None:
        """Return the rank of the most urgent waiting request; None if there is none."""
        return min((image.rank for image in self._images.values()), default=None)

    def next_tiles(self, most: int) -> list[PendingTile]:
        """Return the next micro-batch: up to ``most`` tiles of one or more images."""
        chosen: dict[PendingTile, None] = {}  # equal tiles are one object
        for image in sorted(self._images.values(), key=lambda each: each.rank):
            if all(request.held for request in image.waiting):
                continue
            for tile in image.tiles:
                if tile.visual is None:
                    chosen[tile] = None
                if len(chosen) == most:
                    return list(chosen)
        return list(chosen)

    def waiting_for(self, tiles: Sequence[PendingTile]) -> set[Request]:
        """Return the requests that wait for any of these tiles."""
        wanted = set(tiles)
        images = [image for image in self._images.values() if wanted.intersection(image.tiles)]
        return {request for image in images for request in image.waiting}

    def complete(
        self, tiles: Sequence[PendingTile], visual: Tensor
    ) -> dict[bytes, tuple[VisualTokens, set[Request]]]:
        """Store the visual tokens of a micro-batch, (N, S, D).

        Returns:
            The images that are complete now and the requests that wait for them, by key.
        """
        for tile, tokens in zip(tiles, visual, strict=True):
            # A copy: a view would keep the whole micro-batch in memory.
            tile.visual = tokens.clone()
        self.tiles_done += len(tiles)
        found = {}
        for key, image in list(self._images.items()):
            if not image.complete:
                continue
            plan = image.plan
            tokens = torch.stack([tile.visual for tile in image.tiles])  # type: ignore[misc]
            made = VisualTokens(tokens, plan.rows, plan.cols, plan.source).keyed(key)
            found[key] = made, image.waiting
            self.cache.put(key, made)
            self.images_done += 1
            del self._images[key]
        return found
