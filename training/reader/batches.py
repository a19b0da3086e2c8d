"""Training batches: pictures as tiles, a label for each patch, and the tokens of one chat each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from smolstack.processor.geometry import plan_tiles
from smolstack.processor.prompt import ChatTemplate, Markers, expand_placeholders, user_message
from smolstack.processor.tiles import cut_tiles
from training.reader import fonts, shape
from training.reader.files import build_tokenizer
from training.reader.pictures import Picture, draw_crowd, draw_picture

BACKGROUND = 0
PATCH_CLASSES = 1 + len(fonts.DIGITS)
COVERED = 0.2  # the share of a patch that a character's box must cover to name it
FINE = 4  # coverage is counted on FINE² points per patch
IGNORED = -100


@dataclass(frozen=True)
class ReaderBatch:
    """B pictures with the same question, and X pictures full of digits without one.

    Attributes:
        tiles: (B + X, 3, P, P) uint8.
        patch_labels: (B + X, H·W) int64, the class of the character under each patch.
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


class DrawnBatches(Dataset[ReaderBatch]):
    """Batch ``i`` is drawn from seeds of its own: nothing is stored or repeated.

    Args:
        size: B, pictures with a question.
        count: batches.
        crowd: X, pictures full of digits.
    """

    def __init__(self, size: int, count: int, seed: int = 0, *, crowd: int = 0) -> None:
        self.size, self.count, self.seed, self.crowd = size, count, seed, crowd

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ReaderBatch:
        first = self.seed * 1_000_000_000 + index * (self.size + self.crowd)
        pictures = [draw_picture(seed) for seed in range(first, first + self.size)]
        crowd = [draw_crowd(first + self.size + extra) for extra in range(self.crowd)]
        rng = random.Random(f"question {first}")
        question = shape.QUESTION if rng.random() < 0.4 else rng.choice(shape.QUESTIONS)
        return make_batch(pictures, question, crowd)


def make_batch(
    pictures: list[Picture], question: str, crowd: Sequence[Picture] = ()
) -> ReaderBatch:
    """Tiles, patch labels and tokens of some pictures."""
    prompt = prompt_ids(question)
    answers = [answer_ids(picture.text) for picture in pictures]
    longest = max(map(len, answers), default=0)
    shown = [*pictures, *crowd]
    token_ids = torch.full((len(pictures), len(prompt) + longest), shape.IDS[shape.PAD])
    labels = torch.full((len(pictures), longest + 1), IGNORED)
    for row, answer in enumerate(answers):
        token_ids[row, : len(prompt)] = torch.tensor(prompt)
        token_ids[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        labels[row, : len(answer)] = torch.tensor(answer)
    return ReaderBatch(
        tiles=torch.cat([to_tile(picture.image) for picture in shown]),
        patch_labels=torch.from_numpy(np.stack([patch_labels(p) for p in shown])),
        token_ids=token_ids,
        labels=labels,
        start=len(prompt) - 1,
        texts=tuple(picture.text for picture in pictures),
    )


def to_tile(image: Image.Image) -> Tensor:
    """The tile that the processor makes of a picture: (1, 3, P, P) uint8."""
    plan = plan_tiles(image.size, shape.SETTINGS, shape.TOKENS_PER_TILE)
    return cut_tiles(image, plan, shape.SETTINGS)


def normalised(tiles: Tensor) -> Tensor:
    """(B, 3, P, P) uint8 → float32 from -1 to 1."""
    return tiles.float() / 127.5 - 1


def relit(batch: ReaderBatch, rng: random.Random) -> ReaderBatch:
    """The same pictures a little lighter or darker, with less or more contrast, or inverted."""
    contrast = rng.uniform(0.75, 1.1) * rng.choice((-1, 1))
    tiles = (normalised(batch.tiles) * contrast + rng.uniform(-0.1, 0.1) + 1) * 127.5
    return replace(batch, tiles=tiles.round().clamp(0, 255).to(torch.uint8))


def patch_labels(picture: Picture) -> npt.NDArray[np.int64]:
    """The class of the character whose box covers most of each patch: (H·W,)."""
    side = shape.GRID * FINE
    painted = Image.new("L", (side, side))
    draw = ImageDraw.Draw(painted)
    x_scale, y_scale = side / picture.image.width, side / picture.image.height
    for character, corners in zip(picture.text, picture.corners, strict=True):
        draw.polygon(
            [(x * x_scale - 0.5, y * y_scale - 0.5) for x, y in corners],
            fill=1 + fonts.DIGITS.index(character),
        )
    points = np.asarray(painted).reshape(shape.GRID, FINE, shape.GRID, FINE)
    counts = (points[..., None] == np.arange(PATCH_CLASSES)).sum(axis=(1, 3))
    counts[..., BACKGROUND] = 0
    best: npt.NDArray[np.int64] = counts.argmax(axis=-1)
    best[counts.max(axis=-1) < COVERED * FINE * FINE] = BACKGROUND
    return best.reshape(-1).astype(np.int64)


@cache
def prompt_ids(question: str) -> tuple[int, ...]:
    """Tokens of the prompt that asks ``question`` about one picture of one tile."""
    text = ChatTemplate(shape.CHAT_TEMPLATE, {}).render([user_message(1, question)])
    plan = plan_tiles((shape.TILE, shape.TILE), shape.SETTINGS, shape.TOKENS_PER_TILE)
    return tuple(_tokenizer().encode(expand_placeholders(text, [plan], Markers())).ids)


def answer_ids(text: str) -> tuple[int, ...]:
    """Tokens of the answer, its leading space and its end included."""
    return (*f" {text or shape.NOTHING}".encode(), shape.IDS[shape.END])


@cache
def _tokenizer() -> tokenizers.Tokenizer:
    return build_tokenizer()
