"""Drawn pictures of printed numbers, each from its own seed.

A picture comes with its text and with the corners of every character, so that the patches of the
tile can be labelled with the character they show. Sizes, fonts, places, colours, backgrounds and
damage vary widely; nothing is read from disk but fonts.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from training.reader import fonts
from training.reader.shape import TILE

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
Color = tuple[int, int, int]
Corners = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Picture:
    """One drawn picture.

    Attributes:
        image: RGB, of any size.
        text: what it says, "" for nothing.
        corners: for each character of ``text``, the four corners of its box in picture pixels.
        family: the font's family.
        digit_width: mean width of a character in pixels of the tile that the model sees.
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
    ink, paper = _colors(rng)
    image = _background(rng, size, paper)
    family = ""
    corners: tuple[Corners, ...] = ()
    if text:
        family, path = pick_font(rng, split)
        mask, corners = _text_mask(rng, text, path, size, _wanted_width(rng))
        place = _place(rng, size, mask.size)
        _paste_text(rng, image, mask, place, ink)
        corners = _moved(corners, place)
    return _finish(rng, image, text, corners, family)


def draw_crowd(seed: int) -> Picture:
    """Draw a picture full of digits, line under line, each line in a font and size of its own.

    For learning to name patches: nearly every patch shows a character.
    """
    rng = random.Random(f"crowd {seed}")
    size = _picture_size(rng)
    ink, paper = _colors(rng)
    image = _background(rng, size, paper)
    text, top = "", 0
    corners: tuple[Corners, ...] = ()
    while True:
        family, path = pick_font(rng, "train")
        wanted = math.exp(rng.uniform(math.log(12.0), math.log(50)))
        count = max(1, min(20, int(TILE / wanted * rng.uniform(0.5, 1))))
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
    width = _mean_width(corners) * TILE / image.width
    glyph = width * max(image.size) / TILE  # what a character's width would be in a square picture
    return Picture(_damage(rng, image, glyph), text, corners, family, width)


def _moved(corners: tuple[Corners, ...], by: tuple[int, int]) -> tuple[Corners, ...]:
    return tuple(tuple((x + by[0], y + by[1]) for x, y in box) for box in corners)


def _wanted_width(rng: random.Random) -> float:
    """How wide a digit should be, in pixels of the tile, as far as the picture has room."""
    return math.exp(rng.uniform(math.log(7.0), math.log(60)))


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
    """(width, height): a common size, or any from 48 to 900 pixels and from 1:2 to 5:1."""
    if rng.random() < 0.35:
        return rng.choice(COMMON_SIZES)
    longest = math.exp(rng.uniform(math.log(80), math.log(700)))
    aspect = math.exp(rng.triangular(math.log(0.5), math.log(5), math.log(1.5)))
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
    em = wanted * width / TILE * len(text) / unit_width
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


def _luminance(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _any_color(rng: random.Random) -> Color:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _colors(rng: random.Random) -> tuple[Color, Color]:
    """Ink and paper, apart enough in luminance to be read."""
    kind = rng.random()
    if kind < 0.3:
        return (0, 0, 0), (255, 255, 255)
    if kind < 0.38:
        return (255, 255, 255), (0, 0, 0)
    while True:
        ink, paper = _any_color(rng), _any_color(rng)
        if kind < 0.6:
            grey = rng.randrange(256), rng.randrange(256)
            ink, paper = (grey[0],) * 3, (grey[1],) * 3
        elif kind < 0.75:
            paper = (rng.randrange(225, 256),) * 3
        if abs(_luminance(ink) - _luminance(paper)) > 70:
            return ink, paper


def _near(rng: random.Random, color: Color, spread: int) -> Color:
    red, green, blue = (min(255, max(0, c + rng.randint(-spread, spread))) for c in color)
    return red, green, blue


def _background(rng: random.Random, size: tuple[int, int], paper: Color) -> Image.Image:
    """Plain paper, a gradient, soft clouds, or paper with lines, frames and spots."""
    kind = rng.random()
    if kind < 0.5:
        image = Image.new("RGB", size, paper)
    elif kind < 0.7:
        corners = Image.new("RGB", (2, 2))
        corners.putdata([_near(rng, paper, 35) for _ in range(4)])
        image = corners.resize(size, Image.Resampling.BICUBIC)
    elif kind < 0.8:
        grid = rng.randint(3, 12)
        clouds = Image.new("RGB", (grid, grid))
        clouds.putdata([_near(rng, paper, 25) for _ in range(grid * grid)])
        image = clouds.resize(size, Image.Resampling.BICUBIC)
    else:
        image = Image.new("RGB", size, paper)
    if kind > 0.8 or rng.random() < 0.1:
        _decorate(rng, image, paper)
    return image


def _decorate(rng: random.Random, image: Image.Image, paper: Color) -> None:
    """Shapes behind the text: frames at the edge, lines and spots of nearly the paper's color."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    if rng.random() < 0.4:
        inset = rng.uniform(0, 0.04) * min(width, height)
        box = (inset, inset, width - 1 - inset, height - 1 - inset)
        draw.rectangle(box, outline=_any_color(rng), width=max(1, min(width, height) // 60))
    for _ in range(rng.randint(0, 5)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        color = _near(rng, paper, 35)
        shape = rng.random()
        if shape < 0.4:
            end = (rng.uniform(0, width), rng.uniform(0, height))
            draw.line(((x, y), end), color, width=rng.randint(1, max(1, height // 40)))
        elif shape < 0.7:
            radius = rng.uniform(0.03, 0.4) * height
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
        else:
            draw.rectangle((x, y, x + rng.uniform(0, width), y + rng.uniform(0, height)), color)


def _paste_text(
    rng: random.Random, image: Image.Image, mask: Image.Image, place: tuple[int, int], ink: Color
) -> None:
    if rng.random() < 0.04:
        shadow = mask.point(lambda value: value // 3)
        offset = max(1, mask.height // 20)
        image.paste(_near(rng, (128, 128, 128), 60), (place[0] + offset, place[1] + offset), shadow)
    image.paste(ink, place, mask)


@cache
def _noise_bank() -> npt.NDArray[np.float32]:
    """(1400, 1400) standard normal numbers, of which pictures take windows."""
    return np.random.default_rng(1).standard_normal((1400, 1400), dtype=np.float32)


def _damage(rng: random.Random, image: Image.Image, glyph: float) -> Image.Image:
    """Blur, noise, uneven light, JPEG, low resolution: each now and then, weaker on small glyphs.

    ``glyph`` is a character's width in picture pixels.
    """
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, min(3.0, 0.07 * glyph + 0.2))))
    if rng.random() < 0.1 and glyph > 10:
        factor = rng.uniform(max(0.3, 8 / glyph), 1)
        small = max(8, round(image.width * factor)), max(8, round(image.height * factor))
        image = image.resize(small, Image.Resampling.BILINEAR).resize(image.size)
    if rng.random() < 0.3:
        image = _add_noise(rng, image, rng.uniform(2, 25 if glyph > 10 else 12))
    if rng.random() < 0.3:
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=rng.randint(30 if glyph > 10 else 60, 95))
        image = Image.open(stored).convert("RGB")
    return image


def _add_noise(rng: random.Random, image: Image.Image, strength: float) -> Image.Image:
    bank = _noise_bank()
    pixels = np.asarray(image, dtype=np.float32)
    height, width = pixels.shape[:2]
    channels = 3 if rng.random() < 0.5 else 1
    windows = []
    for _ in range(channels):
        top, left = rng.randrange(1400 - height), rng.randrange(1400 - width)
        windows.append(bank[top : top + height, left : left + width])
    noise = np.stack(windows, axis=-1) * strength
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
