"""Draw where the reader points while it reads: its cells as a path over images held out.

Each image is shown at the size of its tiles, with the tiles' edges, a frame around each cell that
the answer names, in order, and the answer under it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import smolstack
from training.reader import shape
from training.reader.evaluate import FIRST_SEED, NEW_TOKENS
from training.reader.images import draw_image
from training.reader.layout import plan_of
from training.reader.pointing import Cell, cell_of
from training.reader.scores import tidy
from training.reader.targets import View

FOOT = 64  # pixels for question and answer
HIGH, WIDE = shape.SCALE * shape.PATCH, shape.SCALE * shape.PATCH // shape.HALVES  # of a cell
EDGE_COLOR, PATH_COLOR = (150, 150, 150), (214, 39, 40)


def draw_path(image: Image.Image, ids: Sequence[int], said: str) -> Image.Image:
    """An image with the path of an answer's tokens over it, and what they say below."""
    canvas = plan_of(image.size).canvas
    shown = Image.new("RGB", (canvas[0], canvas[1] + FOOT), "white")
    shown.paste(image.convert("RGB").resize(canvas), (0, 0))
    draw = ImageDraw.Draw(shown)
    for edge in range(shape.TILE, shape.EDGE, shape.TILE):
        draw.line((edge, 0, edge, canvas[1]), EDGE_COLOR)
        draw.line((0, edge, canvas[0], edge), EDGE_COLOR)
    cells = [cell for token in ids if (cell := cell_of(token)) is not None]
    frames = [_frame(cell, canvas) for cell in cells]
    for left, top, right, bottom in frames:
        draw.rectangle((left, top, right - 1, bottom - 1), outline=PATH_COLOR)
    if len(frames) > 1:
        middles = [((left + right) // 2, (top + low) // 2) for left, top, right, low in frames]
        draw.line(middles, PATH_COLOR)
    draw.text((4, canvas[1] + 4), said, "black", font=ImageFont.load_default(12))
    return shown


def _frame(cell: Cell, canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """What a cell shows: left, top, right, bottom, on an image of the size of its tiles."""
    if cell.view is View.WHOLE:
        wide, high = canvas[0] // shape.CELLS // shape.HALVES, canvas[1] // shape.CELLS
    else:
        wide, high = WIDE, HIGH
    return cell.col * wide, cell.row * high, (cell.col + 1) * wide, (cell.row + 1) * high


def arrange(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images in columns, each under the lowest of the shortest column."""
    heights = [0] * columns
    places = []
    for image in images:
        column = heights.index(min(heights))
        places.append((column * (shape.EDGE + 8), heights[column]))
        heights[column] += image.height
    sheet = Image.new("RGB", (columns * (shape.EDGE + 8) - 8, max(heights)), "white")
    for image, place in zip(images, places, strict=True):
        sheet.paste(image, place)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder; the bundled reader if left out")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--first", type=int, default=FIRST_SEED, help="the first image's seed")
    parser.add_argument("--question", default=shape.QUESTION)
    parser.add_argument("--out", type=Path, default=Path(".cache/reader/paths.png"))
    options = parser.parse_args()
    vlm = smolstack.load() if options.model is None else smolstack.load(options.model)
    drawn = []
    for seed in range(options.first, options.first + options.count):
        image = draw_image(seed, "held-out")
        answer = vlm.ask(image.image, options.question, max_new_tokens=NEW_TOKENS)
        drawn.append(draw_path(image.image, answer.token_ids, tidy(answer.text)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    arrange(drawn, columns=3).quantize(128).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
