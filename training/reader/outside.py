"""Measure the reader on pictures that its own generator did not draw.

A second, much plainer way of drawing, which shares no code with ``pictures.py`` but the rule for
numbers held out: one number anywhere in a picture of a usual size, filling from a fifth of its
width to nearly all of it, small digits included. So it shows what the generator's own choice of
sizes hides.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import defaultdict

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import smolstack
from training.reader import fonts, shape
from training.reader.pictures import is_held_out

SIZES = ((200, 80), (400, 200), (640, 480), (256, 256), (320, 320))
FAMILIES = ("DejaVu Sans", "DejaVu Serif", "DejaVu Mono", "Open Sans", "Caladea")
COLORS = (
    ("black", "white"),
    ("white", "black"),
    ("navy", "lightyellow"),
    ("darkred", "lightblue"),
    ("yellow", "darkgreen"),
    ("#333333", "#ddddbb"),
    ("white", "#b03030"),
)
FILLS = {"a fifth to two fifths": (0.2, 0.4), "to seven tenths": (0.4, 0.7), "more": (0.7, 0.92)}
DAMAGE = ("none", "noise", "blur", "JPEG", "rotation")
SMALL = 14  # pixels of the tile


def draw(rng: random.Random) -> tuple[Image.Image, str, dict[str, str]]:
    """A picture, its number, and the classes that it counts in."""
    width, height = rng.choice(SIZES)
    text = _number(rng)
    fill = rng.choice(list(FILLS))
    wanted = rng.uniform(*FILLS[fill]) * width
    family = rng.choice((*FAMILIES, "Pillow's own"))
    files = fonts.families("held-out").get(family, [])
    path = rng.choice(files) if files else None
    size = max(12.0, min(wanted / _font(path, 100).getlength(text) * 100, height * 0.85))
    font = _font(path, size)
    ink, paper = rng.choice(COLORS)
    image = Image.new("RGB", (width, height), paper)
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    x = rng.uniform(0, max(0, width - (right - left))) - left
    y = rng.uniform(0, max(0, height - (bottom - top))) - top
    canvas.text((x, y), text, fill=ink, font=font)
    damage = rng.choice(DAMAGE)
    digit = (right - left) / len(text) * shape.TILE / width
    classes = {
        "digits": str(len(text)),
        "number's share of the width": fill,
        "damage": damage,
        "family": family,
        "digit width on the tile": f"under {SMALL} px" if digit < SMALL else f"{SMALL} px and more",
    }
    return _damaged(rng, image, damage, size, paper), text, classes


def _number(rng: random.Random) -> str:
    length = rng.randint(1, 6)
    while True:
        text = str(rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length))
        if length == 1 or is_held_out(text):
            return text


def _font(path: str | None, size: float) -> ImageFont.FreeTypeFont:
    if path is not None:
        return ImageFont.truetype(path, size)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType")
    return font


def _damaged(
    rng: random.Random, image: Image.Image, damage: str, size: float, paper: str
) -> Image.Image:
    if damage == "noise":
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 12, (*image.size[::-1], 3))
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if damage == "blur":
        return image.filter(ImageFilter.GaussianBlur(min(1.2, size / 30)))
    if damage == "JPEG":
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=50)
        return Image.open(stored).convert("RGB")
    if damage == "rotation":
        return image.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=paper)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder; the bundled reader if left out")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    vlm = smolstack.load() if options.model is None else smolstack.load(options.model)
    rng = random.Random(options.seed)
    groups: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(options.count):
        image, text, classes = draw(rng)
        answer = vlm.ask(image, shape.QUESTION, max_new_tokens=12).text.strip()
        for kind, name in {"all": "all", **classes}.items():
            groups[kind][name].append(answer == text)
    figures = {
        kind: {
            name: {"exact": round(sum(right) / len(right), 4), "pictures": len(right)}
            for name, right in sorted(names.items())
        }
        for kind, names in groups.items()
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
