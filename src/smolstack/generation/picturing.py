"""Pictures on their way to visual tokens, a few tiles at a time, each once for everybody."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.generation.pictures import PictureCache
from smolstack.model.vision import distinct_tiles
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.geometry import TilePlan
from smolstack.processor.inputs import Picture
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import normalise, read_tiles


@dataclass(frozen=True)
class Cut:
    """A picture cut into tiles but not encoded.

    Attributes:
        tiles: (n, 3, P, P) uint8.
        firsts: the tiles that differ; copies: for each tile its place among them.
    """

    plan: TilePlan
    tiles: Tensor
    firsts: list[int]
    copies: list[int]


@dataclass
class _Work:
    cut: Cut
    done: list[Tensor] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)


class Picturing:
    """The pictures that sequences wait for.

    Attributes:
        tiles_done: tiles that went through the tower, for the record.
        pictures_done: pictures encoded.
    """

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, cache: PictureCache
    ) -> None:
        self.model, self.processor, self.cache = model, processor, cache
        self.tiles_done = self.pictures_done = 0
        self._work: OrderedDict[bytes, _Work] = OrderedDict()

    def __len__(self) -> int:
        return len(self._work)

    def prepare(self, picture: Picture, plan: TilePlan) -> tuple[bytes, Cut | None]:
        """A picture's key, and its tiles unless it is known already. Safe in any thread.

        Raises:
            ImageError: the picture cannot be decoded.
        """
        assert not isinstance(picture, VisualTokens)
        key = self.cache.key(picture, plan, self.processor.settings, self.model)
        if key in self._work or key in self.cache:
            return key, None
        return key, self.cut(picture, plan)

    def cut(self, picture: Picture, plan: TilePlan) -> Cut:
        """Open a picture and cut its tiles. Safe in any thread."""
        assert not isinstance(picture, VisualTokens)
        tiles = read_tiles(picture, plan, self.processor.settings)
        return Cut(plan, tiles, *distinct_tiles(tiles))

    def known(self, key: bytes) -> VisualTokens | None:
        """The visual tokens of a picture that was encoded before."""
        return self.cache.get(key)

    def want(self, key: bytes, cut: Cut | None, number: int) -> bool:
        """Sequence ``number`` waits for a picture; False when its tiles are still needed."""
        if key not in self._work:
            if cut is None:
                return False
            self._work[key] = _Work(cut)
        self._work[key].waiting.add(number)
        return True

    def leave(self, number: int) -> None:
        """A sequence waits no longer; pictures that nobody waits for are dropped."""
        for key, work in list(self._work.items()):
            work.waiting.discard(number)
            if not work.waiting:
                del self._work[key]

    def step(self, tiles: int) -> tuple[dict[bytes, VisualTokens], set[int]]:
        """Encode the next micro-batch, of up to ``tiles`` tiles of one or several pictures.

        Returns:
            The pictures that are complete now, and the sequences that had a tile in it.
        """
        chosen: list[tuple[_Work, int]] = []
        for work in self._work.values():
            room = tiles - sum(count for _, count in chosen)
            left = len(work.cut.firsts) - sum(part.shape[0] for part in work.done)
            if min(room, left) > 0:
                chosen.append((work, min(room, left)))
        pixels = torch.cat([_next_tiles(work, count) for work, count in chosen])
        with torch.inference_mode():
            visual = self.model.encode_tiles(normalise(pixels, self.processor.settings))
        for (work, _), part in zip(
            chosen, torch.split(visual, [count for _, count in chosen]), strict=True
        ):
            # A copy of its own: a view would keep every picture of the micro-batch alive.
            work.done.append(part.clone())
        self.tiles_done += pixels.shape[0]
        for_whom = {number for work, _ in chosen for number in work.waiting}
        return self._complete(), for_whom

    def _complete(self) -> dict[bytes, VisualTokens]:
        complete = {}
        for key, work in list(self._work.items()):
            if sum(part.shape[0] for part in work.done) < len(work.cut.firsts):
                continue
            cut, plan = work.cut, work.cut.plan
            visual = work.done[0] if len(work.done) == 1 else torch.cat(work.done)
            if len(cut.firsts) < len(cut.copies):
                visual = visual[cut.copies]
            complete[key] = VisualTokens(visual, plan.rows, plan.cols, plan.source)
            self.cache.put(key, complete[key])
            self.pictures_done += 1
            del self._work[key]
        return complete


def _next_tiles(work: _Work, count: int) -> Tensor:
    start = sum(part.shape[0] for part in work.done)
    return work.cut.tiles[work.cut.firsts[start : start + count]]
