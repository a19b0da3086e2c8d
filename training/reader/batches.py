"""Training batches: images as tiles, a label for each patch, and the tokens of one chat each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import tokenizers
import torch
from PIL import Image
from torch import Tensor

from smolstack.processor.prompt import ChatTemplate, Markers, expand_placeholders, user_message
from smolstack.processor.tiles import cut_tiles
from training.reader import shape
from training.reader.files import build_tokenizer
from training.reader.images import DrawnImage
from training.reader.labels import IGNORED, Shown, patch_labels
from training.reader.layout import plan_of
from training.reader.pointing import Answer, Question, plain_answer, pointing_answer
from training.reader.targets import spots_of


@dataclass(frozen=True)
class ReaderBatch:
    """B images with a question each, of n tiles in all, and X tiles full of text without one.

    Attributes:
        tiles: (n + X, 3, P, P) uint8.
        patch_labels: (n + X, H·W) int64, the class of the character under each patch.
        patch_places: (n + X, H·W, WHERE) float32, where it stands (labels.py).
        patch_next: (n + X, H·W, 4) int64, the cells of the next character there (labels.py).
        token_ids: (B, T) int64, prompt and answer, padded on the right.
        images: (n·64,) int64, where image tokens stand in ``token_ids``, flattened.
        at: (M,) int64, where in it answer tokens are predicted.
        goals: (M, G) int64, every token that would be right next, then IGNORED; the one that
            follows in ``token_ids`` is one of them.
    """

    tiles: Tensor
    patch_labels: Tensor
    patch_places: Tensor
    patch_next: Tensor
    token_ids: Tensor
    images: Tensor
    at: Tensor
    goals: Tensor

    @property
    def asked_tiles(self) -> int:
        """How many tiles belong to images with a question; the crowded ones follow."""
        return len(self.images) // shape.TOKENS_PER_TILE

    def to(self, device: torch.device) -> ReaderBatch:
        """The same batch there."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ReaderBatch:
        """The same batch where a GPU fetches it while the processor goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ReaderBatch:
        return ReaderBatch(*(change(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class Asked:
    """Images that are cut alike and asked the same question; ``points``: so do the answers."""

    images: list[DrawnImage]
    question: Question
    points: bool = True


@dataclass(frozen=True)
class Room:
    """The size of a batch's token tensors, where all are to be alike; the last row is spare."""

    rows: int
    length: int
    answers: int = 0
    goals: int = 0

    @property
    def spare(self) -> int:
        """A place that nothing looks at."""
        return self.rows * self.length - 1

    def takes(self, row: int, length: int, answers: int) -> bool:
        """Whether one more chat, with so many tokens, fits in."""
        if not self.answers:
            return True
        return row < self.rows - 1 and length <= self.length and answers <= self.answers


Labelled = tuple[Tensor, Tensor, Tensor, Tensor]  # tiles; classes, places, next cells of patches


def labelled(image: DrawnImage) -> Labelled:
    """Tiles of an image and the labels of their patches."""
    size = image.image.size
    plan = plan_of(size)
    shown = Shown(image.characters, image.lengths, image.gaps, image.corners, image.width)
    labels = patch_labels(size, (plan.rows, plan.cols), shown)
    classes, places, following = (torch.from_numpy(part) for part in labels)
    return to_tiles(image.image), classes, places, following


def make_batch(groups: list[Asked], parts: list[Labelled], room: Room | None = None) -> ReaderBatch:
    """Tokens of groups of images, and the tiles: first of these, then without a question."""
    tiles, *labels = (torch.cat(part) for part in zip(*parts, strict=True))
    chats = [
        (prompt_ids(group.question.words, _grid(image)), _answer(group, image))
        for group in groups
        for image in group.images
    ]
    if room is None:
        lengths = [len(prompt) + len(answer.ids) for prompt, answer in chats]
        room = Room(len(chats), max(lengths, default=0))
    token_ids = torch.full((room.rows, room.length), shape.IDS[shape.PAD])
    images: list[int] = []
    at: list[int] = []
    all_goals: list[list[int]] = []
    row = 0
    for prompt, answer in chats:
        ids = (*prompt, *answer.ids)
        seen = [index for index, token in enumerate(prompt) if token == shape.IDS[shape.IMAGE]]
        if not room.takes(row, len(ids), len(at) + len(answer.ids)):
            images += [room.spare] * len(seen)
            continue
        first = row * room.length
        token_ids[row, : len(ids)] = torch.tensor(ids)
        images += [first + index for index in seen]
        at += range(first + len(prompt) - 1, first + len(ids) - 1)
        all_goals += answer.goals
        row += 1
    if room.answers:
        images += [room.spare] * (len(tiles) * shape.TOKENS_PER_TILE - len(images))
        at += [room.spare] * (room.answers - len(at))
    most = room.goals or max(map(len, all_goals), default=1)
    goals = torch.full((len(at), most), IGNORED)
    for index, of_token in enumerate(all_goals):
        goals[index, : len(of_token)] = torch.tensor(of_token[:most])
    classes, places, following = labels
    return ReaderBatch(
        tiles,
        classes,
        places,
        following,
        token_ids,
        torch.tensor(images, dtype=torch.long),
        torch.tensor(at, dtype=torch.long),
        goals,
    )


def _answer(group: Asked, image: DrawnImage) -> Answer:
    if not group.points:
        return plain_answer(group.question.answer(image.lines))
    return wanted(group.question, image, random.Random(f"answer {image.size} {image.lines}"))


def wanted(question: Question, image: DrawnImage, rng: random.Random | None = None) -> Answer:
    """The answer about an image, pointing at what is read."""
    lines, following = image.lines, iter(image.corners)
    corners = [[next(following) for _ in line.replace(" ", "")] for line in lines]
    spots = spots_of(image.size, _grid(image), corners)
    return pointing_answer(question, lines, spots, rng)


def _grid(image: DrawnImage) -> tuple[int, int]:
    plan = plan_of(image.size)
    return plan.rows, plan.cols


def to_tiles(image: Image.Image) -> Tensor:
    """The tiles that the processor makes of an image: (n, 3, P, P) uint8."""
    return cut_tiles(image, plan_of(image.size), shape.SETTINGS)


def normalized(tiles: Tensor) -> Tensor:
    """(N, 3, P, P) uint8 → float32 from -1 to 1."""
    return tiles.float() / 127.5 - 1


@cache
def prompt_ids(question: str, grid: tuple[int, int]) -> tuple[int, ...]:
    """Tokens of the prompt that asks ``question`` about one image of (rows, cols) tiles."""
    text = ChatTemplate(shape.CHAT_TEMPLATE, {}).render([user_message(1, question)])
    rows, cols = grid
    plan = plan_of((cols * shape.TILE, rows * shape.TILE))
    if (plan.rows, plan.cols) != grid:
        raise ValueError(f"no image is cut into {rows} rows and {cols} columns")
    return tuple(_tokenizer().encode(expand_placeholders(text, [plan], Markers())).ids)


@cache
def _tokenizer() -> tokenizers.Tokenizer:
    return build_tokenizer()
