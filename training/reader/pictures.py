"""Drawn pictures of printed numbers, each from its own seed.

A picture comes with its text and with the corners of every character, so that the patches of the
tile can be labelled with the character they show. Sizes, fonts, places, colours, backgrounds and
damage vary widely; nothing is read from disk but fonts.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from smolstack.processor.geometry import TilePlan, plan_tiles
from training.reader import fonts, shape
from training.reader.paper import (
    Color,
    choose_colors,
    damage,
    draw_background,
    draw_plate,
    near,
)

COMMON_SIZES = (
    (200, 80),
    (400, 200),
    (640, 480),
    (256, 256),
    (320, 240),
    (300, 100),
    (224, 224),
    (480, 320),
    (600, 400),
    (512, 512),
)
MAX_DIGITS = 6
PLATES = 0.2  # the share of pictures whose number stands on a plate
Corners = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Picture:
    """One drawn picture.

    Attributes:
        image: RGB, of any size.
        text: what it says, "" for nothing.
        corners: for each character of ``text``, the four corners of its box in picture pixels.
        family: the font's family.
        digit_width: mean width of a character in pixels of the tiles that the model sees.
    """

    image: Image.Image
    text: str
    corners: tuple[Corners, ...]
    family: str
    digit_width: float


def is_held_out(text: str) -> bool:
    """Whether a number is kept for the test: one in ten of those of two digits and more."""
    if len(text) < 2:
        return False
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def plan_of(size: tuple[int, int]) -> TilePlan:
    """The tiles that the reader cuts a picture of ``size`` (width, height) into."""
    return plan_tiles(size, shape.SETTINGS, shape.TOKENS_PER_TILE)


def layout_of(seed: int, split: str = "train") -> tuple[int, int]:
    """(rows, cols) of the picture that ``seed`` draws, without drawing it."""
    plan = plan_of(_picture_size(random.Random(f"{split} {seed}")))
    return plan.rows, plan.cols


def draw_picture(seed: int, split: str = "train", *, empty: float = 0.04) -> Picture:
    """Draw a picture of a number of the split, in a font of the split.

    Args:
        seed: the same seed gives the same picture.
        split: "train", or "held-out" for fonts and numbers that training never sees.
        empty: the share of pictures without a number.
    """
    rng = random.Random(f"{split} {seed}")
    size = _picture_size(rng)
    text = "" if rng.random() < empty else _number(rng, split)
    ink, paper = choose_colors(rng)
    image = draw_background(rng, size, paper)
    family = ""
    corners: tuple[Corners, ...] = ()
    if text:
        family, path = pick_font(rng, split)
        mask, corners = _text_mask(rng, text, path, size, _wanted_width(rng))
        place = _place(rng, size, mask.size)
        if rng.random() < PLATES:
            draw_plate(rng, image, (*place, place[0] + mask.width, place[1] + mask.height), paper)
        _paste_text(rng, image, mask, place, ink)
        corners = _moved(corners, place)
    return _finish(rng, image, text, corners, family)


def draw_crowd(seed: int) -> Picture:
    """Draw a picture full of digits, line under line, each line in a font and size of its own.

    For learning to name patches: nearly every patch shows a character.
    """
    rng = random.Random(f"crowd {seed}")
    size = _picture_size(rng)
    ink, paper = choose_colors(rng)
    image = draw_background(rng, size, paper)
    text, top = "", 0
    corners: tuple[Corners, ...] = ()
    while True:
        family, path = pick_font(rng, "train")
        wanted = math.exp(rng.uniform(math.log(9.0), math.log(48)))
        count = max(1, int(plan_of(size).canvas[0] / wanted * rng.uniform(0.4, 0.95)))
        line = "".join(rng.choices(fonts.DIGITS, k=count))
        mask, boxes = _text_mask(rng, line, path, size, wanted)
        if text and top + mask.height > size[1]:
            return _finish(rng, image, text, corners, family)
        place = rng.randint(0, max(0, size[0] - mask.width)), top
        _paste_text(rng, image, mask, place, ink)
        text, corners = text + line, corners + _moved(boxes, place)
        top += mask.height + rng.randint(1, 2 + mask.height // 2)


def _finish(
    rng: random.Random, image: Image.Image, text: str, corners: tuple[Corners, ...], family: str
) -> Picture:
    width = _mean_width(corners)
    scale = plan_of(image.size).canvas[0] / image.width
    return Picture(damage(rng, image, width), text, corners, family, width * scale)


def _moved(corners: tuple[Corners, ...], by: tuple[int, int]) -> tuple[Corners, ...]:
    return tuple(tuple((x + by[0], y + by[1]) for x, y in box) for box in corners)


def _wanted_width(rng: random.Random) -> float:
    """How wide a digit should be, in pixels of the tiles, as far as the picture has room."""
    return math.exp(rng.uniform(math.log(9.0), math.log(100)))


def pick_font(rng: random.Random, split: str) -> tuple[str, str]:
    """A family, each as likely as another, and one of its files."""
    families = fonts.families(split)
    family = rng.choice(list(families))
    return family, rng.choice(families[family])


def _number(rng: random.Random, split: str) -> str:
    length = rng.choices(range(1, MAX_DIGITS + 1), weights=(1, 1.5, 2, 2.5, 2.5, 2.5))[0]
    while True:
        digits = "".join(rng.choices(fonts.DIGITS, k=length))
        if rng.random() < 0.15:  # runs of one digit are hard to count
            start = rng.randrange(length)
            run = rng.randint(2, 4)
            digits = (digits[:start] + digits[start] * run + digits[start + run :])[:length]
        if length > 1 and digits[0] == "0" and rng.random() < 0.7:
            digits = rng.choice(fonts.DIGITS[1:]) + digits[1:]
        if length == 1 or is_held_out(digits) == (split == "held-out"):
            return digits


def _picture_size(rng: random.Random) -> tuple[int, int]:
    """(width, height): a common size, or any from 48 to 900 pixels and from 2:5 to 6:1."""
    if rng.random() < 0.35:
        return rng.choice(COMMON_SIZES)
    longest = math.exp(rng.uniform(math.log(80), math.log(700)))
    aspect = math.exp(rng.triangular(math.log(0.4), math.log(6), math.log(1.6)))
    if aspect >= 1:
        return round(longest), max(24, round(longest / aspect))
    return max(24, round(longest * aspect)), round(longest)


def _text_mask(
    rng: random.Random, text: str, path: str, size: tuple[int, int], wanted: float
) -> tuple[Image.Image, tuple[Corners, ...]]:
    """The text as a mask just large enough, and its characters' corners on it."""
    width, height = size
    angle = math.radians(rng.gauss(0, 4)) if rng.random() < 0.4 else 0.0
    tracking = rng.uniform(-0.02, 0.35) if rng.random() < 0.25 else 0.0
    unit = ImageFont.truetype(path, 100)
    unit_width = sum(unit.getlength(c) for c in text) / 100 + tracking * (len(text) - 1)
    unit_height = (unit.getbbox(text)[3] - unit.getbbox(text)[1]) / 100
    em = wanted * width / plan_of(size).canvas[0] * len(text) / unit_width
    wide = unit_width * math.cos(angle) + unit_height * abs(math.sin(angle))
    high = unit_height * math.cos(angle) + unit_width * abs(math.sin(angle))
    room = min(width * rng.uniform(0.8, 0.97) / wide, height * rng.uniform(0.75, 0.95) / high)
    em = max(min(em, room), min(room, 11.0))
    pixels = max(6, round(em))
    font = ImageFont.truetype(path, pixels)
    pad = max(2, round(pixels * 0.08))
    boxes, x = [], float(pad)
    ascent = max(0, -min(0, int(font.getbbox(text)[1])))
    room_for = round(pixels * unit_width) + 2 * pad + pixels // 3, 2 * (pixels + pad)
    mask = Image.new("L", room_for)
    draw = ImageDraw.Draw(mask)
    for character in text:
        draw.text((x, pad + ascent), character, 255, font=font)
        left, top, right, bottom = font.getbbox(character)
        boxes.append((x + left, pad + ascent + top, x + right, pad + ascent + bottom))
        x += font.getlength(character) + tracking * pixels
    crop = mask.getbbox() or (0, 0, *mask.size)
    mask = mask.crop(crop)
    corners = [_corners(box, crop[:2]) for box in boxes]
    if angle:
        mask, corners = _rotate(mask, corners, angle)
    return mask, tuple(corners)


def _corners(box: tuple[float, float, float, float], origin: tuple[int, int]) -> Corners:
    left, right = box[0] - origin[0], box[2] - origin[0]
    top, bottom = box[1] - origin[1], box[3] - origin[1]
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _rotate(
    mask: Image.Image, corners: list[Corners], angle: float
) -> tuple[Image.Image, list[Corners]]:
    turned = mask.rotate(math.degrees(angle), Image.Resampling.BICUBIC, expand=True)
    cos, sin = math.cos(angle), math.sin(angle)
    old, new = (mask.width / 2, mask.height / 2), (turned.width / 2, turned.height / 2)
    moved = []
    for box in corners:
        shifted = [(x - old[0], y - old[1]) for x, y in box]
        moved.append(
            tuple((x * cos + y * sin + new[0], y * cos - x * sin + new[1]) for x, y in shifted)
        )
    return turned, moved


def _place(
    rng: random.Random, size: tuple[int, int], text_size: tuple[int, int]
) -> tuple[int, int]:
    free = max(0, size[0] - text_size[0]), max(0, size[1] - text_size[1])
    if rng.random() < 0.3:
        return free[0] // 2, free[1] // 2
    return rng.randint(0, free[0]), rng.randint(0, free[1])


def _mean_width(corners: tuple[Corners, ...]) -> float:
    if not corners:
        return 0.0
    return sum(math.dist(box[0], box[1]) for box in corners) / len(corners)


def _paste_text(
    rng: random.Random, image: Image.Image, mask: Image.Image, place: tuple[int, int], ink: Color
) -> None:
    if rng.random() < 0.04:
        shadow = mask.point(lambda value: value // 3)
        offset = max(1, mask.height // 20)
        image.paste(near(rng, (128, 128, 128), 60), (place[0] + offset, place[1] + offset), shadow)
    image.paste(ink, place, mask)
