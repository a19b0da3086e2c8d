"""Drawn images of printed text, each from its own seed.

An image comes with its lines and with the corners of every character, so that the patches of the
tiles can be labelled with the character they show. Sizes, fonts, places, colours, backgrounds and
damage vary widely; nothing is read from disk but fonts and a dictionary.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from training.reader import shape
from training.reader.layout import Layout, image_size, lay_out, pick_font, plan_of
from training.reader.lines import Corners, moved, set_line
from training.reader.paper import Color, choose_colors, damage, draw_background, draw_plate, near
from training.reader.text import draw_line

PLATES = 0.12  # the share of images whose text stands on a plate
# In images full of text: the share of those with large characters, the greatest width of one on
# the tiles, and of one in other images; the share that is as narrow as on the tile of the whole.
LARGE, LARGEST, MEDIUM, SQUEEZED = 0.25, 90, 36, 0.15


@dataclass(frozen=True)
class DrawnImage:
    """One drawn image.

    Attributes:
        image: RGB, of any size.
        lines: what it says, from top to bottom; empty for nothing.
        characters: every visible character, in reading order.
        lengths: how many of these are in each line.
        gaps: for each of ``characters``, whether a space follows.
        corners: for each of ``characters``, the four corners of its box in image pixels.
        family: the font's family.
        width: mean width of a character in pixels of the tiles that the model sees.
    """

    image: Image.Image
    lines: tuple[str, ...]
    characters: str
    lengths: tuple[int, ...]
    gaps: tuple[bool, ...]
    corners: tuple[Corners, ...]
    family: str
    width: float

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def draw_image(
    seed: int, split: str = "train", level: float = 1.0, full: float = 0.0
) -> DrawnImage:
    """Draw an image of text of the split, in a font of the split.

    Args:
        seed: the same seed (with the same level) gives the same image.
        split: "train", or "held-out" for fonts and strings that training never sees.
        level: from 0, one short line of small characters, to 1, up to four lines of up to 24.
        full: the share of images with as many and as long lines as the level allows: a reader
            learns more from them, and they cost no more.
    """
    layout, rng = lay_out(seed, split, level, full)
    ink, paper = choose_colors(rng)
    image = draw_background(rng, layout.size, paper)
    if layout.lines:
        mask = _mask(layout)
        place = layout.place
        if rng.random() < PLATES:
            draw_plate(rng, image, (*place, place[0] + mask.width, place[1] + mask.height), paper)
        _paste_text(rng, image, mask, place, ink)
    texts = tuple(line.text for line in layout.lines)
    return _finish(
        rng,
        image,
        texts,
        characters=layout.characters,
        lengths=layout.lengths,
        gaps=layout.gaps,
        corners=layout.corners,
        family=layout.family,
    )


def draw_crowd(seed: int, split: str = "train", level: float = 1.0) -> DrawnImage:
    """Draw an image full of text, line under line, each line in a font and size of its own.

    For learning to name patches: nearly every patch shows a character. ``level`` is the share of
    images that are as varied as those with a question; the others are black on white, undamaged,
    not stretched, and their characters not small.
    """
    rng = random.Random(f"crowd {seed}" if split == "train" else f"crowd {split} {seed}")
    easy = rng.random() >= level
    size = (shape.EDGE, shape.EDGE) if easy else image_size(rng)
    shown = plan_of(size).canvas[0]  # the width that the image has on the tiles
    squeezed = rng.choice((2, 3)) if not easy and rng.random() < SQUEEZED else 1
    size = squeezed * size[0], size[1]
    ink, paper = ((0, 0, 0), (255, 255, 255)) if easy else choose_colors(rng)
    image = Image.new("RGB", size, paper) if easy else draw_background(rng, size, paper)
    draw = ImageDraw.Draw(image)
    largest = LARGEST if not easy and rng.random() < LARGE else MEDIUM
    characters, top = "", rng.randint(0, 4)
    lengths: tuple[int, ...] = ()
    gaps: tuple[bool, ...] = ()
    corners: tuple[Corners, ...] = ()
    while True:
        family, path = pick_font(rng, split)
        wanted = math.exp(rng.uniform(math.log(15.0 if easy else 9.0), math.log(largest)))
        em = max(6, round(min(wanted * size[0] / shown / 0.55, size[1] * 0.7)))
        text = _filler(rng, max(1, round(size[0] / (em * 0.5))))
        line = set_line(text, path, em, rng.choice((0.0, 0.0, 0.0, 0.1)))
        if characters and top + line.height > size[1]:
            break
        left = rng.randint(-em // 3, max(0, round(size[0] - line.width)))
        line.draw(draw, (left, top), ink)
        characters += line.characters
        lengths += (len(line.characters),)
        gaps += line.gaps
        corners += moved(line.corners, (left, top))
        top += round(line.height * rng.uniform(0.85, 1.3)) + 1
    if squeezed > 1:
        image = image.resize((size[0] // squeezed, size[1]), Image.Resampling.BOX)
        corners = tuple(tuple((x / squeezed, y) for x, y in box) for box in corners)
    return _finish(
        rng,
        image,
        (),
        characters=characters,
        lengths=lengths,
        gaps=gaps,
        corners=corners,
        family=family,
    )


def _filler(rng: random.Random, length: int) -> str:
    """Text of about ``length`` characters: words and numbers, or any characters alike."""
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        if rng.random() < 0.5:
            parts.append("".join(rng.choices(shape.CHARACTERS, k=rng.randint(2, 8))))
        else:
            parts.append(draw_line(rng, "train", rng.randint(3, 12)))
    return " ".join(parts)[:length].strip() or "0"


def _mask(layout: Layout) -> Image.Image:
    """The text as a mask just large enough for the block, turned."""
    mask = Image.new("L", layout.block)
    draw = ImageDraw.Draw(mask)
    for line in layout.lines:
        line.draw(draw, (0, 0), 255)
    if layout.angle:
        mask = mask.rotate(layout.angle, Image.Resampling.BICUBIC, expand=True)
    return mask


def _finish(
    rng: random.Random | None,
    image: Image.Image,
    lines: tuple[str, ...],
    *,
    characters: str,
    lengths: tuple[int, ...],
    gaps: tuple[bool, ...],
    corners: tuple[Corners, ...],
    family: str,
) -> DrawnImage:
    width = sum(math.dist(box[0], box[1]) for box in corners) / max(1, len(corners))
    scale = plan_of(image.size).canvas[0] / image.width
    drawn = DrawnImage(image, lines, characters, lengths, gaps, corners, family, width * scale)
    return drawn if rng is None else replace(drawn, image=damage(rng, image, width))


def _paste_text(
    rng: random.Random, image: Image.Image, mask: Image.Image, place: tuple[int, int], ink: Color
) -> None:
    if rng.random() < 0.04:
        shadow = mask.point(lambda value: value // 3)
        offset = max(1, mask.height // 20)
        image.paste(near(rng, (128, 128, 128), 60), (place[0] + offset, place[1] + offset), shadow)
    image.paste(ink, place, mask)
