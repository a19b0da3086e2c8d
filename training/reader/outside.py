"""Measure the reader on images that its own generator did not draw.

A second, much plainer way of drawing, which shares no code with ``images.py`` but the rule for
what is held out and the dictionary: one number, or one to four lines of words and numbers, anywhere
in an image of a usual size, filling from a fifth of its width to nearly all of it, small
characters included. So it shows what the generator's own choice of sizes hides.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import smolstack
from smolstack.vlm import VLM
from training.reader import fonts, shape
from training.reader.evaluate import NEW_TOKENS
from training.reader.scores import Result, ask_tesseract, figures, tidy
from training.reader.text import is_held_out, words

SIZES = ((200, 80), (400, 200), (640, 480), (256, 256), (320, 320))
STRIPS = ((384, 48), (400, 100), (600, 150))
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
SMALL = 14  # pixels of the tiles


Drawn = tuple[Image.Image, str, dict[str, str]]


def draw_number(rng: random.Random) -> Drawn:
    """An image, its number, and the classes that it counts in."""
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
    digit = (right - left) / len(text) * shape.EDGE / width
    classes = {
        "digits": str(len(text)),
        "number's share of the width": fill,
        "damage": damage,
        "family": family,
        "width on the tiles": f"under {SMALL} px" if digit < SMALL else f"{SMALL} px and more",
    }
    return _damaged(rng, image, damage, size, paper), text, classes


def draw_text(rng: random.Random) -> Drawn:
    """An image of one to four lines, what they say, and the classes that it counts in."""
    width, height = rng.choice((*SIZES, *STRIPS))
    count = rng.choice((1, 1, 1, 2, 3, 4)) if height >= width / 3 else 1
    lines = [_line(rng, rng.choice((8, 16, 24))) for _ in range(count)]
    text = "\n".join(lines)
    family = rng.choice((*FAMILIES, "Pillow's own"))
    files = fonts.families("held-out").get(family, [])
    path = rng.choice(files) if files else None
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    unit = canvas.multiline_textbbox((0, 0), text, font=_font(path, 100))
    wide, high = (unit[2] - unit[0]) / 100, (unit[3] - unit[1]) / 100
    damage = rng.choice(DAMAGE)
    turned = damage == "rotation"  # then in the middle and smaller, so that no corner is cut off
    wanted = rng.uniform(0.4, 0.85 if turned else 0.95) * width
    room = 0.6 if turned else 0.9
    size = max(9.0, min(wanted / wide, width * 0.97 / wide, height * room / high))
    font = _font(path, size)
    ink, paper = rng.choice(COLORS)
    image = Image.new("RGB", (width, height), paper)
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = canvas.multiline_textbbox((0, 0), text, font=font)
    x = (0.5 if turned else rng.random()) * max(0, width - (right - left)) - left
    y = (0.5 if turned else rng.random()) * max(0, height - (bottom - top)) - top
    canvas.multiline_text((x, y), text, fill=ink, font=font)
    mean = (right - left) / max(map(len, lines)) * shape.EDGE / width
    longest = max(map(len, lines))
    classes = {
        "kind": "blocks of two to four lines"
        if count > 1
        else "one line of " + ("up to 16" if longest <= 16 else "17 to 24"),
        "lines": str(count),
        "damage": damage,
        "family": family,
        "width on the tiles": f"under {SMALL} px" if mean < SMALL else f"{SMALL} px and more",
    }
    return _damaged(rng, image, damage, size, paper), text, classes


def _line(rng: random.Random, longest: int) -> str:
    """Words and numbers that are held out, with a common mark here and there."""
    common, known = words("held-out")
    line = ""
    while True:
        word = _number(rng) if rng.random() < 0.25 else rng.choice(rng.choice((common, known)))
        word = rng.choice((word, word, word.capitalize(), word.upper()))
        word += rng.choice(("", "", "", "", ".", ",", ":", "!", "?"))
        longer = f"{line} {word}".strip()
        if len(longer) > longest:
            if line:
                return line
            continue
        line = longer
        if rng.random() < 0.3:
            return line


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


def measure(
    vlm: VLM, count: int, seed: int, draw: Callable[[random.Random], Drawn]
) -> dict[str, dict[str, dict[str, float | int]]]:
    """Figures by kind of class and class."""
    rng = random.Random(seed)
    groups: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(count):
        image, text, classes = draw(rng)
        answer = tidy(vlm.ask(image, shape.QUESTION, max_new_tokens=NEW_TOKENS).text)
        result = Result(image, shape.QUESTION, text, answer, ask_tesseract(image))
        for kind, name in {"all": "all", **classes}.items():
            groups[kind][name].append(result)
    return {
        kind: {name: figures(results) for name, results in sorted(names.items())}
        for kind, names in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder; the bundled reader if left out")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", default="text", choices=["text", "numbers"])
    options = parser.parse_args()
    vlm = smolstack.load() if options.model is None else smolstack.load(options.model)
    draw = draw_text if options.of == "text" else draw_number
    print(json.dumps(measure(vlm, options.count, options.seed, draw), indent=2))


if __name__ == "__main__":
    main()
