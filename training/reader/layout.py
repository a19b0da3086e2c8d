"""Lay out an image before it is drawn: its size, its words, where and how large lines stand."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from smolstack.processor.geometry import TilePlan, plan_tiles
from training.reader import fonts, shape
from training.reader.lines import Corners, Line, moved, set_line, turned
from training.reader.text import draw_line

COMMON_SIZES = (
    (200, 80),
    (400, 100),
    (400, 200),
    (640, 480),
    (256, 256),
    (320, 240),
    (300, 100),
    (384, 48),
    (480, 320),
    (600, 400),
    (600, 150),
    (512, 128),
    (320, 64),
)
EMPTY = 0.04  # the share of images without text
LARGE, LARGEST = 0.3, 260.0  # the share of images of a few large characters; their width there
NARROWEST = 9.0  # mean width of a character on the tiles, in their pixels


@dataclass(frozen=True)
class Layout:
    """An image before it is drawn: its size and its lines, set and placed."""

    size: tuple[int, int]
    lines: tuple[Line, ...]
    block: tuple[int, int]
    place: tuple[int, int]
    angle: float
    family: str

    @property
    def characters(self) -> str:
        return "".join(line.characters for line in self.lines)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many visible characters each line has."""
        return tuple(len(line.characters) for line in self.lines)

    @property
    def gaps(self) -> tuple[bool, ...]:
        """For each visible character, whether a space follows."""
        return tuple(gap for line in self.lines for gap in line.gaps)

    @property
    def corners(self) -> tuple[Corners, ...]:
        """Corners of every visible character, in image pixels."""
        corners = tuple(box for line in self.lines for box in line.corners)
        return moved(turned(corners, self.block, self.angle), self.place)


def plan_of(size: tuple[int, int]) -> TilePlan:
    """The tiles that the reader cuts an image of ``size`` (width, height) into."""
    return plan_tiles(size, shape.SETTINGS, shape.TOKENS_PER_TILE)


def grid_of(seed: int, split: str = "train") -> tuple[int, int]:
    """(rows, cols) of the image that ``seed`` draws, without drawing it."""
    plan = plan_of(image_size(random.Random(f"{split} {seed}")))
    return plan.rows, plan.cols


def lay_out(
    seed: int, split: str = "train", level: float = 1.0, full: float = 0.0
) -> tuple[Layout, random.Random]:
    """Size, text and places of the image that ``seed`` draws, and what goes on drawing it."""
    rng = random.Random(f"{split} {seed}")
    size = image_size(rng)
    family, path = pick_font(rng, split)
    if rng.random() < EMPTY:
        return Layout(size, (), (0, 0), (0, 0), 0.0, ""), rng
    longest = 1 + round((shape.MAX_LENGTH - 1) * min(1.0, 0.3 + 0.7 * level))
    most = 1 + round((shape.MAX_LINES - 1) * level)
    count = 1 if rng.random() < 0.5 else rng.randint(1, most)
    length = rng.choice((rng.randint(1, longest), rng.randint(1, longest), rng.randint(1, 8)))
    drawn = 1
    if rng.random() < full:
        count, length, drawn = most, longest, 3
    large = drawn == 1 and rng.random() < LARGE
    if large:
        count, length = 1, rng.randint(1, 8)
    scale = plan_of(size).canvas[0] / size[0]
    angle = rng.gauss(0, 2.5) if rng.random() < 0.35 else 0.0
    wanted = math.exp(rng.uniform(math.log(11), math.log(22 + 48 * level)))
    if large:
        wanted = math.exp(rng.uniform(math.log(24), math.log(LARGEST)))
    spacing, tracking = rng.uniform(1.0, 1.7), 0.0
    if rng.random() < 0.2:
        tracking = rng.uniform(-0.02, 0.25)
    fill = rng.uniform(0.7, 0.97), rng.uniform(0.7, 0.95)
    align = rng.choice((0.0, 0.0, 0.5, 0.5, 1.0))
    while True:
        shares = [1.0, *(rng.choice((1.0, rng.uniform(0.2, 1.0))) for _ in range(count - 1))]
        lengths = [max(1, round(length * share)) for share in shares]
        texts = [
            max((draw_line(rng, split, length_of) for _ in range(drawn)), key=len)
            for length_of in lengths
        ]
        unit = [set_line(text, path, 100, tracking) for text in texts]
        wide = max(line.width for line in unit) / 100
        high = sum(line.height for line in unit) / 100 * (1 + (spacing - 1) * (count - 1) / count)
        turn = math.radians(abs(angle))
        rooms = (
            fill[0] * size[0] / (wide * math.cos(turn) + high * math.sin(turn)),
            fill[1] * size[1] / (high * math.cos(turn) + wide * math.sin(turn)),
        )
        room = min(rooms)
        mean = sum(line.width for line in unit) / 100 / sum(map(len, texts))
        if room * mean * scale >= NARROWEST * 0.95 and room >= 6:
            break
        if count > 1 and (rooms[1] < rooms[0] or length == 1):
            count -= 1
        else:
            length = max(1, int(length * 0.8))
        if length == 1 and count == 1 and len(texts[0]) == 1:
            break
    em = max(6, round(min(room, max(wanted, NARROWEST) / (mean * scale))))
    lines, block = _set_block(texts, path, em, tracking=tracking, spacing=spacing, align=align)
    outer = _turned_size(block, angle)
    layout = Layout(size, lines, block, _place(rng, size, outer), angle, family)
    return layout, rng


def _set_block(
    texts: list[str], path: str, em: int, *, tracking: float, spacing: float, align: float
) -> tuple[tuple[Line, ...], tuple[int, int]]:
    """Lines one under the other, each with its place in the block, and the block's size."""
    lines = [set_line(text, path, em, tracking) for text in texts]
    wide = math.ceil(max(line.width for line in lines)) + 2
    placed, top = [], 1.0
    for line in lines:
        placed.append(line.at(1 + (wide - 2 - line.width) * align, top))
        top += line.height * spacing
    high = math.ceil(top - lines[-1].height * (spacing - 1)) + 1
    return tuple(placed), (wide, high)


def _turned_size(block: tuple[int, int], angle: float) -> tuple[int, int]:
    if not angle:
        return block
    turn = math.radians(abs(angle))
    wide = block[0] * math.cos(turn) + block[1] * math.sin(turn)
    high = block[1] * math.cos(turn) + block[0] * math.sin(turn)
    return math.ceil(wide), math.ceil(high)


def pick_font(rng: random.Random, split: str) -> tuple[str, str]:
    """A family, each as likely as another, and one of its files."""
    families = fonts.families(split)
    family = rng.choice(list(families))
    return family, rng.choice(families[family])


def image_size(rng: random.Random) -> tuple[int, int]:
    """(width, height): a common size, or any whose longer side has 80 to 700 pixels.

    Strips, three times as wide as high and more, are half of all: they cost the fewest tiles.
    """
    if rng.random() < 0.3:
        return rng.choice(COMMON_SIZES)
    longest = round(math.exp(rng.uniform(math.log(100), math.log(700))))
    kind = rng.random()
    if kind < 0.5:
        aspect = math.exp(rng.uniform(math.log(3), math.log(8)))
    elif kind < 0.8:
        aspect = rng.uniform(1.5, 3)
    elif kind < 0.95:
        aspect = rng.uniform(1, 1.5)
    else:
        aspect = rng.uniform(0.6, 1)
    if aspect >= 1:
        return longest, max(16, round(longest / aspect))
    return round(longest * aspect), longest


def _place(
    rng: random.Random, size: tuple[int, int], text_size: tuple[int, int]
) -> tuple[int, int]:
    free = max(0, size[0] - text_size[0]), max(0, size[1] - text_size[1])
    if rng.random() < 0.3:
        return free[0] // 2, free[1] // 2
    return rng.randint(0, free[0]), rng.randint(0, free[1])
