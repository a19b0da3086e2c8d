"""Images of numbers, drawn with Pillow's built-in font, and with DejaVu if it is installed."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZES = ((200, 80), (320, 160), (400, 200), (256, 256), (320, 240))
DEJAVU = sorted(Path("/usr/share/fonts/truetype/dejavu").glob("DejaVuSans*.ttf"))
PAPERS, INKS = ("white", "lightyellow", "lightblue", "mistyrose"), ("black", "navy", "darkred")


def draw_number(rng: random.Random) -> tuple[Image.Image, str]:
    """Return an image of a number of one to five digits at a random position, and the number."""
    width, height = rng.choice(SIZES)
    count = rng.randint(1, 5)
    number = "".join(rng.choices("0123456789", k=count))
    digit = rng.uniform(0.11, min(0.19, 0.9 / count)) * width  # width of a digit
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    if DEJAVU and rng.random() < 0.6:
        font = ImageFont.truetype(str(rng.choice(DEJAVU)), digit * 1.6)
    else:
        font = ImageFont.load_default(digit * 1.75)
    image = Image.new("RGB", (width, height), rng.choice(PAPERS))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), number, font=font)
    room = (max(0, width - (right - left)), max(0, height - (bottom - top)))
    place = (rng.uniform(0, room[0]) - left, rng.uniform(0, room[1]) - top)
    draw.text(place, number, fill=rng.choice(INKS), font=font)
    return image, number


def draw_folder(folder: Path, count: int, seed: int) -> Path:
    """Draw ``count`` images and write metadata.jsonl, in the format of ``smolstack train``."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        image, text = draw_number(rng)
        image.save(folder / f"{number:05d}.png")
        lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
