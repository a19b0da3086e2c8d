"""Batches drawn on the spot: groups of images that are asked, and tiles full of text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset

from training.reader import shape
from training.reader.batches import Asked, Labelled, ReaderBatch, Room, labelled, make_batch
from training.reader.images import draw_crowd, draw_image
from training.reader.layout import grid_of, lay_out
from training.reader.pointing import Question

SEEDS_PER_BATCH = 10_000
COUNTING, ONE_LINE = 0.12, 0.25  # shares of batches that ask for the count, and for one line
PLAIN = 0.15  # the share of batches whose answers do not point, as constrained ones cannot
UNFIT = 0.15  # the share kept of images that have no line of the number asked for


class DrawnBatches(Dataset[ReaderBatch]):
    """Batch ``i`` is drawn from seeds of its own: nothing is stored or repeated.

    Args:
        groups: of images that are cut into the same rows and columns and asked the same.
        size: tiles of a group, about.
        count: batches; over the first ``growing`` of them, lines grow longer and more, crowds
            harder.
        tiles: n + X, in all: as many of them as are left over are full of text.
        full: the share of images with as many and as long lines as the level allows.
        split: whose fonts and strings.
        room: for token tensors that are all alike.
    """

    def __init__(
        self,
        groups: int,
        size: int,
        count: int,
        seed: int = 0,
        *,
        tiles: int = 0,
        growing: int = 0,
        full: float = 0.0,
        split: str = "train",
        room: Room | None = None,
    ) -> None:
        self.room = room
        self.groups, self.size, self.count, self.seed = groups, size, count, seed
        self.tiles, self.growing, self.full, self.split = tiles, growing, full, split

    def level_at(self, index: int) -> float:
        """How varied batch ``index`` is, from 0 to 1."""
        return min(1.0, index / self.growing) if self.growing else 1.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ReaderBatch:
        first = self.seed * 1_000_000_000 + index * SEEDS_PER_BATCH
        level = self.level_at(index)
        room = SEEDS_PER_BATCH // (self.groups + 1)
        groups = [self._group(first + (1 + g) * room, level) for g in range(self.groups)]
        parts = [labelled(image) for group in groups for image in group.images]
        left = self.tiles - sum(len(tiles) for tiles, *_ in parts)
        if left > 0:
            parts.append(_crowded(first, left, self.split, level))
        return make_batch(groups, parts, self.room)

    def _group(self, first: int, level: float) -> Asked:
        rng = random.Random(f"batch {first}")
        points = rng.random() >= PLAIN
        full = self.full if points else 0.0
        question = draw_question(rng, level)
        rows, cols = grid_of(first, self.split)
        wanted = max(1, round(self.size / (rows * cols + 1)))
        alike = (s for s in itertools.count(first) if grid_of(s, self.split) == (rows, cols))
        seeds = itertools.islice(self._fitting(rng, alike, question, (level, full)), wanted)
        images = [draw_image(seed, self.split, level, full) for seed in seeds]
        return Asked(images, question, points)

    def _fitting(
        self,
        rng: random.Random,
        seeds: Iterator[int],
        question: Question,
        levels: tuple[float, float],
    ) -> Iterator[int]:
        """Those of the seeds whose images, mostly, have the line that is asked for."""
        for seed in seeds:
            if question.line:
                lines = len(lay_out(seed, self.split, *levels)[0].lines)
                plain = lines < 2 if question.line < 2 else lines < question.line
                if plain and rng.random() > (0.4 if question.line < 2 else UNFIT):
                    continue
            yield seed


def draw_question(rng: random.Random, level: float) -> Question:
    """A question: mostly for everything, at times for the count or for one line."""
    kind = rng.random()
    if kind < COUNTING:
        return Question(rng.choice(shape.COUNT_QUESTIONS), -1)
    if kind < COUNTING + ONE_LINE:
        line = rng.randint(1, 1 + round((shape.MAX_LINES - 1) * level))
        return Question(rng.choice(shape.LINE_QUESTIONS).format(line), line)
    words = shape.QUESTION if rng.random() < 0.4 else rng.choice(shape.QUESTIONS)
    return Question(words)


def _crowded(first: int, count: int, split: str, level: float) -> Labelled:
    """``count`` tiles full of text and their labels."""
    taken: list[Labelled] = []
    seeds = itertools.count(first)
    while sum(len(tiles) for tiles, *_ in taken) < count:
        tiles, *labels = labelled(draw_crowd(next(seeds), split, level))
        taken.append((tiles[:-1], labels[0][:-1], labels[1][:-1], labels[2][:-1]))
    tiles, classes, places, following = (
        torch.cat(part)[:count] for part in zip(*taken, strict=True)
    )
    return tiles, classes, places, following
