"""A fixed set of images of printed numbers, and the accuracy of answers about them.

They are drawn with Pillow's built-in font, so they are the same with the same version of Pillow.
The bundled reader's training shares no code with them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZES = ((640, 400), (480, 480), (400, 300), (800, 500), (300, 200))


@dataclass(frozen=True)
class Drawn:
    """An image and the number in it."""

    image: Image.Image
    text: str


def drawn_numbers(count: int, seed: int = 0) -> list[Drawn]:
    """Draw numbers of one to six digits: dark on light or light on dark, filling 30 to 85 % of
    the width, at random positions.
    """
    chance = random.Random(seed)
    return [_draw(chance) for _ in range(count)]


def _draw(chance: random.Random) -> Drawn:
    digits = chance.randint(1, 6)
    text = str(chance.randint(10 ** (digits - 1), 10**digits - 1))
    width, height = chance.choice(SIZES)
    light = tuple(chance.randint(200, 255) for _ in range(3))
    dark = tuple(chance.randint(0, 90) for _ in range(3))
    paper, ink = (light, dark) if chance.random() < 0.75 else (dark, light)
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    font, box = _fitting(draw, text, chance.uniform(0.3, 0.85) * width, 0.7 * height)
    left = chance.uniform(0.04 * width, 0.96 * width - (box[2] - box[0]))
    top = chance.uniform(0.04 * height, 0.96 * height - (box[3] - box[1]))
    draw.text((left - box[0], top - box[1]), text, ink, font)
    return Drawn(image, text)


def _fitting(
    draw: ImageDraw.ImageDraw, text: str, width: float, height: float
) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, tuple[float, float, float, float]]:
    """Return the largest font in which a text fits into the size, and the text's box in it."""
    size = 100.0
    for _ in range(2):
        box = draw.textbbox((0, 0), text, font=ImageFont.load_default(size))
        size *= min(width / (box[2] - box[0]), height / (box[3] - box[1]))
    font = ImageFont.load_default(size)
    return font, draw.textbbox((0, 0), text, font=font)


def exact_share(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Return the share of answers that are exactly correct."""
    return sum(a == t for a, t in zip(answers, truths, strict=True)) / len(truths)


def character_error_rate(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Insertions, deletions and substitutions (Levenshtein 1966) per character of the truths."""
    errors = sum(_distance(a, t) for a, t in zip(answers, truths, strict=True))
    return errors / sum(map(len, truths))


def _distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
