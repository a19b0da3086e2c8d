"""What drawn images are drawn on, and what happens to them: colors, backgrounds, damage."""

from __future__ import annotations

import io
import random
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]


def _luminance(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _any_color(rng: random.Random) -> Color:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def choose_colors(rng: random.Random) -> tuple[Color, Color]:
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


def near(rng: random.Random, color: Color, spread: int) -> Color:
    red, green, blue = (min(255, max(0, c + rng.randint(-spread, spread))) for c in color)
    return red, green, blue


def draw_background(rng: random.Random, size: tuple[int, int], paper: Color) -> Image.Image:
    """Plain paper, a gradient, soft clouds, or paper with lines, frames and spots."""
    kind = rng.random()
    if kind < 0.5:
        image = Image.new("RGB", size, paper)
    elif kind < 0.7:
        corners = Image.new("RGB", (2, 2))
        corners.putdata([near(rng, paper, 35) for _ in range(4)])
        image = corners.resize(size, Image.Resampling.BICUBIC)
    elif kind < 0.8:
        grid = rng.randint(3, 12)
        clouds = Image.new("RGB", (grid, grid))
        clouds.putdata([near(rng, paper, 25) for _ in range(grid * grid)])
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
        color = near(rng, paper, 35)
        shape = rng.random()
        if shape < 0.4:
            end = (rng.uniform(0, width), rng.uniform(0, height))
            draw.line(((x, y), end), color, width=rng.randint(1, max(1, height // 40)))
        elif shape < 0.7:
            radius = rng.uniform(0.03, 0.4) * height
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
        else:
            draw.rectangle((x, y, x + rng.uniform(0, width), y + rng.uniform(0, height)), color)


def draw_plate(
    rng: random.Random, image: Image.Image, text: tuple[int, int, int, int], paper: Color
) -> None:
    """Another background, and on it a plate of paper behind the text, with or without a frame.

    ``text`` is the box that the characters will cover.
    """
    left, top, right, bottom = text
    room = bottom - top
    image.paste(draw_background(rng, image.size, _any_color(rng)))
    draw = ImageDraw.Draw(image)
    margin = rng.uniform(0.15, 0.8) * room, rng.uniform(0.15, 0.6) * room
    outer = left - margin[0], top - margin[1], right + margin[0], bottom + margin[1]
    radius = rng.choice((0.0, rng.uniform(0, 0.4))) * room
    draw.rounded_rectangle(outer, radius, paper)
    if rng.random() < 0.7:
        inset = rng.uniform(0, 0.5) * min(margin)
        frame = outer[0] + inset, outer[1] + inset, outer[2] - inset, outer[3] - inset
        width = max(1, round(rng.uniform(0.01, 0.06) * room))
        draw.rounded_rectangle(
            frame, max(0.0, radius - inset), outline=_any_color(rng), width=width
        )
    if rng.random() < 0.3:  # screws
        size = max(1.0, 0.05 * room)
        for x in (outer[0] + margin[0] / 2, outer[2] - margin[0] / 2):
            y = (outer[1] + outer[3]) / 2
            draw.ellipse((x - size, y - size, x + size, y + size), _any_color(rng))


@cache
def _noise_bank() -> npt.NDArray[np.float32]:
    """(1400, 1400) standard normal numbers, of which images take windows."""
    return np.random.default_rng(1).standard_normal((1400, 1400), dtype=np.float32)


def damage(rng: random.Random, image: Image.Image, glyph: float) -> Image.Image:
    """Blur, noise, uneven light, JPEG, low resolution: each now and then, weaker on small glyphs.

    ``glyph`` is a character's width in image pixels.
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
