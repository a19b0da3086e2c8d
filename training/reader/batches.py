"""Training batches: pictures as tiles, a label for each patch, and the tokens of one chat each."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from smolstack.processor.prompt import ChatTemplate, Markers, expand_placeholders, user_message
from smolstack.processor.tiles import cut_tiles
from training.reader import fonts, shape
from training.reader.files import build_tokenizer
from training.reader.pictures import Picture, draw_crowd, draw_picture, layout_of, plan_of

BACKGROUND = 0
PATCH_CLASSES = 1 + len(fonts.DIGITS)
COVERED = 0.2  # the share of a patch that a character's box must cover to name it
FINE = 4  # coverage is counted on FINE² points per patch
IGNORED = -100
READABLE = 6  # pixels of the whole picture's tile
SEEDS_PER_BATCH = 10_000


@dataclass(frozen=True)
class ReaderBatch:
    """B pictures of n tiles each with the same question, and X tiles full of digits without one.

    Attributes:
        tiles: (B·n + X, 3, P, P) uint8.
        patch_labels: (B·n + X, H·W) int64, the class of the character under each patch.
        token_ids: (B, T) int64, prompt and answer, padded on the right.
        labels: (B, T - start) int64, the token that follows each position from ``start`` on.
        start: the prompt's last position, where the answer's first token is predicted.
        texts: what each picture says.
    """

    tiles: Tensor
    patch_labels: Tensor
    token_ids: Tensor
    labels: Tensor
    start: int
    texts: tuple[str, ...]

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
        count: batches.
        crowd: X, tiles full of digits.
    """

    def __init__(self, size: int, count: int, seed: int = 0, *, crowd: int = 0) -> None:
        self.size, self.count, self.seed, self.crowd = size, count, seed, crowd

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ReaderBatch:
        first = self.seed * 1_000_000_000 + index * SEEDS_PER_BATCH
        rng = random.Random(f"batch {first}")
        rows, cols = layout_of(first)
        wanted = round(self.size / (rows * cols + 1))
        alike = (seed for seed in itertools.count(first) if layout_of(seed) == (rows, cols))
        pictures = [draw_picture(seed) for seed in itertools.islice(alike, wanted)]
        question = shape.QUESTION if rng.random() < 0.4 else rng.choice(shape.QUESTIONS)
        return make_batch(pictures, question, _crowded(first, self.crowd))


def _crowded(first: int, count: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """``count`` tiles full of digits and their patch labels."""
    tiles, labels = [torch.zeros(0, 3, shape.TILE, shape.TILE, dtype=torch.uint8)], []
    labels = [np.zeros((0, shape.GRID**2), dtype=np.int64)]
    seeds = itertools.count(first)
    while sum(map(len, tiles)) < count:
        picture = draw_crowd(next(seeds))
        tiles.append(to_tiles(picture.image)[:-1])  # of the whole picture only a blur is left
        labels.append(patch_labels(picture)[:-1])
    return torch.cat(tiles)[:count], np.concatenate(labels)[:count]


def make_batch(
    pictures: list[Picture],
    question: str,
    crowd: tuple[Tensor, npt.NDArray[np.int64]] | None = None,
) -> ReaderBatch:
    """Tiles, patch labels and tokens of pictures that are cut alike."""
    crowd_tiles, crowd_labels = _crowded(0, 0) if crowd is None else crowd
    prompt = prompt_ids(question, layout_of_picture(pictures[0])) if pictures else ()
    answers = [answer_ids(picture.text) for picture in pictures]
    longest = max(map(len, answers), default=0)
    token_ids = torch.full((len(pictures), len(prompt) + longest), shape.IDS[shape.PAD])
    labels = torch.full((len(pictures), longest + 1), IGNORED)
    for row, answer in enumerate(answers):
        token_ids[row, : len(prompt)] = torch.tensor(prompt)
        token_ids[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        labels[row, : len(answer)] = torch.tensor(answer)
    return ReaderBatch(
        tiles=torch.cat([*(to_tiles(picture.image) for picture in pictures), crowd_tiles]),
        patch_labels=torch.from_numpy(
            np.concatenate([*(patch_labels(picture) for picture in pictures), crowd_labels])
        ),
        token_ids=token_ids,
        labels=labels,
        start=len(prompt) - 1,
        texts=tuple(picture.text for picture in pictures),
    )


def layout_of_picture(picture: Picture) -> tuple[int, int]:
    """(rows, cols) that a picture is cut into."""
    plan = plan_of(picture.image.size)
    return plan.rows, plan.cols


def to_tiles(image: Image.Image) -> Tensor:
    """The tiles that the processor makes of a picture: (n, 3, P, P) uint8."""
    return cut_tiles(image, plan_of(image.size), shape.SETTINGS)


def normalised(tiles: Tensor) -> Tensor:
    """(B, 3, P, P) uint8 → float32 from -1 to 1."""
    return tiles.float() / 127.5 - 1


def relit(batch: ReaderBatch, rng: random.Random) -> ReaderBatch:
    """The same pictures a little lighter or darker, with less or more contrast, or inverted."""
    pictures = len(batch.texts)
    each = batch.picture_tiles // pictures if pictures else 0
    crowd = len(batch.tiles) - batch.picture_tiles
    lights = [
        (rng.uniform(0.75, 1.1) * rng.choice((-1, 1)), rng.uniform(-0.1, 0.1))
        for _ in range(pictures + crowd)
    ]
    times = torch.tensor([each] * pictures + [1] * crowd)
    contrast, shift = (
        torch.tensor(lights).repeat_interleave(times, dim=0)[..., None, None, None].unbind(1)
    )
    tiles = (normalised(batch.tiles) * contrast + shift + 1) * 127.5
    return replace(batch, tiles=tiles.round().clamp(0, 255).to(torch.uint8))


def patch_labels(picture: Picture) -> npt.NDArray[np.int64]:
    """The class of the character whose box covers most of each patch of each tile: (n, H·W).

    Characters too small to be told on the tile of the whole picture are IGNORED there.
    """
    plan = plan_of(picture.image.size)
    grid = _labels_of_grid(picture, plan.rows, plan.cols)
    side = shape.GRID
    tiles = [
        grid[row * side : (row + 1) * side, col * side : (col + 1) * side].reshape(-1)
        for row in range(plan.rows)
        for col in range(plan.cols)
    ]
    whole = _labels_of_grid(picture, 1, 1).reshape(-1)
    if picture.digit_width / plan.cols < READABLE:
        whole[whole != BACKGROUND] = IGNORED
    return np.stack([*tiles, whole])


def _labels_of_grid(picture: Picture, rows: int, cols: int) -> npt.NDArray[np.int64]:
    """Labels of the whole picture laid over rows by cols tiles: (rows·H, cols·W)."""
    width, height = cols * shape.GRID * FINE, rows * shape.GRID * FINE
    painted = Image.new("L", (width, height))
    draw = ImageDraw.Draw(painted)
    x_scale, y_scale = width / picture.image.width, height / picture.image.height
    for character, corners in zip(picture.text, picture.corners, strict=True):
        draw.polygon(
            [(x * x_scale - 0.5, y * y_scale - 0.5) for x, y in corners],
            fill=1 + fonts.DIGITS.index(character),
        )
    points = np.asarray(painted).reshape(rows * shape.GRID, FINE, cols * shape.GRID, FINE)
    counts = (points[..., None] == np.arange(PATCH_CLASSES)).sum(axis=(1, 3))
    counts[..., BACKGROUND] = 0
    best: npt.NDArray[np.int64] = counts.argmax(axis=-1)
    best[counts.max(axis=-1) < COVERED * FINE * FINE] = BACKGROUND
    return best.astype(np.int64)


@cache
def prompt_ids(question: str, layout: tuple[int, int]) -> tuple[int, ...]:
    """Tokens of the prompt that asks ``question`` about one picture of (rows, cols) tiles."""
    text = ChatTemplate(shape.CHAT_TEMPLATE, {}).render([user_message(1, question)])
    rows, cols = layout
    plan = plan_of((cols * shape.TILE, rows * shape.TILE))
    if (plan.rows, plan.cols) != layout:
        raise ValueError(f"no picture is cut into {rows} rows and {cols} columns")
    return tuple(_tokenizer().encode(expand_placeholders(text, [plan], Markers())).ids)


def answer_ids(text: str) -> tuple[int, ...]:
    """Tokens of the answer, its leading space and its end included."""
    return (*f" {text or shape.NOTHING}".encode(), shape.IDS[shape.END])


@cache
def _tokenizer() -> tokenizers.Tokenizer:
    return build_tokenizer()
