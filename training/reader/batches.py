"""Training batches: pictures as tiles, a label for each patch, and the tokens of one chat each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import tokenizers
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from smolstack.processor.prompt import ChatTemplate, Markers, expand_placeholders, user_message
from smolstack.processor.tiles import cut_tiles
from training.reader import shape
from training.reader.files import build_tokenizer
from training.reader.labels import BACKGROUND, IGNORED, Shown, patch_labels
from training.reader.layout import Layout, grid_of, lay_out, plan_of
from training.reader.pictures import Picture, draw_crowd, draw_picture
from training.reader.pointing import Answer, Question, plain_answer, pointing_answer
from training.reader.targets import spots_of

SEEDS_PER_BATCH = 10_000
COUNTING, ONE_LINE = 0.12, 0.25  # shares of batches that ask for the count, and for one line
PLAIN = 0.05  # the share of batches whose answers do not point, as constrained ones cannot
UNFIT = 0.15  # the share kept of pictures that have no line of the number asked for


@dataclass(frozen=True)
class ReaderBatch:
    """B pictures of n tiles each with the same question, and X tiles full of text without one.

    Attributes:
        tiles: (B·n + X, 3, P, P) uint8; (0, 3, P, P) where nothing was drawn.
        patch_labels: (B·n + X, H·W) int64, the class of the character under each patch.
        patch_places: (B·n + X, H·W, WHERE) float32, where it stands (labels.py).
        patch_next: (B·n + X, H·W, 4) int64, the cells of the next character there (labels.py).
        token_ids: (B, T) int64, prompt and answer, padded on the right.
        goals: (B, T - start, G) int64, from position ``start`` on: every token that would be right
            next, then IGNORED; the one that follows in ``token_ids`` is one of them.
        start: the prompt's last position, where the answer's first token is predicted.
    """

    tiles: Tensor
    patch_labels: Tensor
    patch_places: Tensor
    patch_next: Tensor
    token_ids: Tensor
    goals: Tensor
    start: int

    @property
    def picture_tiles(self) -> int:
        """How many tiles belong to pictures with a question; the crowded ones follow."""
        images = (self.token_ids == shape.IDS[shape.IMAGE]).sum()
        return int(images) // shape.TOKENS_PER_TILE


class DrawnBatches(Dataset[ReaderBatch]):
    """Batch ``i`` is drawn from seeds of its own: nothing is stored or repeated.

    All pictures of a batch are cut into the same rows and columns, so nothing is padded.

    Args:
        size: tiles of pictures with a question, about.
        count: batches; over the first half of them, lines grow longer and more, crowds harder.
        crowd: X, tiles full of text.
        asked: False for pictures without a question, of which only tiles with text are taken.
        drawn: False for labels alone, without the tiles.
        level: where growing starts; 1 for none.
        full: the share of pictures with as many and as long lines as the level allows.
        split: whose fonts and strings.
    """

    def __init__(
        self,
        size: int,
        count: int,
        seed: int = 0,
        *,
        crowd: int = 0,
        asked: bool = True,
        drawn: bool = True,
        level: float = 1.0,
        full: float = 0.0,
        split: str = "train",
    ) -> None:
        self.size, self.count, self.seed, self.crowd = size, count, seed, crowd
        self.asked, self.drawn, self.level, self.full, self.split = asked, drawn, level, full, split

    def level_at(self, index: int) -> float:
        """How varied batch ``index`` is, from 0 to 1."""
        return min(1.0, self.level + (1 - self.level) * 2 * index / self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ReaderBatch:
        first = self.seed * 1_000_000_000 + index * SEEDS_PER_BATCH
        rng = random.Random(f"batch {first}")
        level = self.level_at(index)
        crowd = [_crowded(first, self.crowd, self.split, level)] if self.crowd else []
        if not self.asked:
            crowd.append(_printed(first, self.size, self.split, (level, self.full)))
        if not self.asked or not self.size:
            return make_batch([], Question(shape.QUESTION), crowd)
        points = rng.random() >= PLAIN
        full = self.full if points else 0.0
        question = draw_question(rng, level)
        rows, cols = grid_of(first, self.split)
        wanted = max(1, round(self.size / (rows * cols + 1)))
        alike = (s for s in itertools.count(first) if grid_of(s, self.split) == (rows, cols))
        seeds = itertools.islice(self._fitting(rng, alike, question, (level, full)), wanted)
        draw = draw_picture if self.drawn else _laid_out
        pictures = [draw(seed, self.split, level, full) for seed in seeds]
        return make_batch(pictures, question, crowd, points=points)

    def _fitting(
        self,
        rng: random.Random,
        seeds: Iterator[int],
        question: Question,
        levels: tuple[float, float],
    ) -> Iterator[int]:
        """Those of the seeds whose pictures, mostly, have the line that is asked for."""
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


def _laid_out(seed: int, split: str, level: float, full: float) -> Layout:
    return lay_out(seed, split, level, full)[0]


Labelled = tuple[Tensor, Tensor, Tensor, Tensor]  # tiles; classes, places, next cells of patches


def _crowded(first: int, count: int, split: str, level: float) -> Labelled:
    """``count`` tiles full of text and their labels."""
    crowds = (draw_crowd(seed, split, level) for seed in itertools.count(first))
    return _gathered((_chosen(labelled(one), slice(-1)) for one in crowds), count)


def _printed(first: int, count: int, split: str, levels: tuple[float, float]) -> Labelled:
    """``count`` tiles of pictures, those that show text, be it too small to be read."""
    pictures = (labelled(draw_picture(seed, split, *levels)) for seed in itertools.count(first))
    return _gathered((_chosen(one, (one[1] != BACKGROUND).any(dim=1)) for one in pictures), count)


def _chosen(labelled: Labelled, which: slice | Tensor) -> Labelled:
    tiles, classes, places, following = labelled
    return tiles[which], classes[which], places[which], following[which]


def _gathered(parts: Iterator[Labelled], count: int) -> Labelled:
    """The first ``count`` tiles."""
    taken: list[Labelled] = []
    while sum(len(tiles) for tiles, *_ in taken) < count:
        taken.append(next(parts))
    tiles, classes, places, following = (
        torch.cat(part)[:count] for part in zip(*taken, strict=True)
    )
    return tiles, classes, places, following


def labelled(picture: Picture | Layout) -> Labelled:
    """Tiles of a picture, none of a mere layout, and the labels of their patches."""
    if isinstance(picture, Layout):
        size, tiles = picture.size, torch.zeros(0, 3, shape.TILE, shape.TILE, dtype=torch.uint8)
    else:
        size, tiles = picture.image.size, to_tiles(picture.image)
    plan = plan_of(size)
    shown = Shown(
        picture.characters, picture.lengths, picture.gaps, picture.corners, _width(picture)
    )
    labels = patch_labels(size, (plan.rows, plan.cols), shown)
    classes, places, following = (torch.from_numpy(part) for part in labels)
    return tiles, classes, places, following


def _width(picture: Picture | Layout) -> float:
    """Mean width of a character on the tiles."""
    if isinstance(picture, Picture):
        return picture.width
    boxes = picture.corners
    scale = plan_of(picture.size).canvas[0] / picture.size[0]
    return scale * sum(box[1][0] - box[0][0] for box in boxes) / max(1, len(boxes))


def make_batch(
    pictures: list[Picture] | list[Layout] | list[Picture | Layout],
    question: Question,
    crowd: list[Labelled],
    *,
    points: bool = True,
) -> ReaderBatch:
    """Tiles, labels and tokens of pictures that are cut alike; ``points``: so do the answers."""
    parts = [*(labelled(picture) for picture in pictures), *crowd]
    tiles, *labels = (torch.cat(part) for part in zip(*parts, strict=True))
    answers = [
        wanted(question, picture, random.Random(f"answer {picture.size} {_lines(picture)}"))
        if points
        else plain_answer(question.answer(_lines(picture)))
        for picture in pictures
    ]
    prompt: tuple[int, ...] = ()
    if pictures:
        prompt = prompt_ids(question.words, _grid(pictures[0]))
    longest = max((len(answer.ids) for answer in answers), default=0)
    all_goals = [answer.goals for answer in answers]
    most = max((len(goals) for of_answer in all_goals for goals in of_answer), default=1)
    token_ids = torch.full((len(pictures), len(prompt) + longest), shape.IDS[shape.PAD])
    goals = torch.full((len(pictures), longest + 1, most), IGNORED)
    for row, (answer, of_answer) in enumerate(zip(answers, all_goals, strict=True)):
        token_ids[row, : len(prompt)] = torch.tensor(prompt)
        token_ids[row, len(prompt) : len(prompt) + len(answer.ids)] = torch.tensor(answer.ids)
        padded = [one + [IGNORED] * (most - len(one)) for one in of_answer]
        goals[row, : len(answer.ids)] = torch.tensor(padded)
    return ReaderBatch(tiles, labels[0], labels[1], labels[2], token_ids, goals, len(prompt) - 1)


def wanted(
    question: Question, picture: Picture | Layout, rng: random.Random | None = None
) -> Answer:
    """The answer about a picture, pointing at what is read."""
    lines, following = _lines(picture), iter(picture.corners)
    corners = [[next(following) for _ in line.replace(" ", "")] for line in lines]
    spots = spots_of(picture.size, _grid(picture), corners)
    return pointing_answer(question, lines, spots, rng)


def _grid(picture: Picture | Layout) -> tuple[int, int]:
    plan = plan_of(picture.size)
    return plan.rows, plan.cols


def _lines(picture: Picture | Layout) -> tuple[str, ...]:
    if isinstance(picture, Picture):
        return picture.lines
    return tuple(line.text for line in picture.lines)


def to_tiles(image: Image.Image) -> Tensor:
    """The tiles that the processor makes of a picture: (n, 3, P, P) uint8."""
    return cut_tiles(image, plan_of(image.size), shape.SETTINGS)


def normalised(tiles: Tensor) -> Tensor:
    """(B, 3, P, P) uint8 → float32 from -1 to 1."""
    return tiles.float() / 127.5 - 1


@cache
def prompt_ids(question: str, grid: tuple[int, int]) -> tuple[int, ...]:
    """Tokens of the prompt that asks ``question`` about one picture of (rows, cols) tiles."""
    text = ChatTemplate(shape.CHAT_TEMPLATE, {}).render([user_message(1, question)])
    rows, cols = grid
    plan = plan_of((cols * shape.TILE, rows * shape.TILE))
    if (plan.rows, plan.cols) != grid:
        raise ValueError(f"no picture is cut into {rows} rows and {cols} columns")
    return tuple(_tokenizer().encode(expand_placeholders(text, [plan], Markers())).ids)


@cache
def _tokenizer() -> tokenizers.Tokenizer:
    return build_tokenizer()
