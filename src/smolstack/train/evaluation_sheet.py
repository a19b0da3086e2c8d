"""Draws evaluation images with question, answer and expected answer; wrong answers first, in
red.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from smolstack.output_files import atomic_file
from smolstack.train.evaluation import Answered

COLUMNS, SHOWN = 4, 24
CELL, IMAGE, LINE, MARGIN = 250, 150, 17, 10


def draw_sheet(answered: Sequence[Answered], path: Path) -> Path:
    """Draw up to 24 answers into a PNG."""
    chosen = sorted(answered, key=lambda one: one.right)[:SHOWN]
    rows = -(-len(chosen) // COLUMNS)
    height = IMAGE + 3 * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (min(len(chosen), COLUMNS) * CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for place, one in enumerate(chosen):
        left, top = place % COLUMNS * CELL + MARGIN, place // COLUMNS * height + MARGIN
        if one.image is not None:
            small = one.image.copy()
            small.thumbnail((CELL - 2 * MARGIN, IMAGE - MARGIN))
            sheet.paste(small, (left, top))
            draw.rectangle((left, top, left + small.width, top + small.height), outline="#bbbbbb")
        ink = "#1b5e20" if one.right else "#b71c1c"
        lines = ((one.question, "#555555"), (one.answer, ink), (f"truth: {one.truth}", "black"))
        for number, (text, color) in enumerate(lines):
            at = (left, top + IMAGE + number * LINE)
            draw.text(at, _fitted(text, font), fill=color, font=font)
    with atomic_file(path) as beside:
        sheet.save(beside, format="PNG")
    return path


def _fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Return one line, truncated to the width of the cell."""
    line = " ".join(text.split())
    while line and font.getlength(line) > CELL - 2 * MARGIN:
        line = line[:-2].rstrip("…") + "…"
    return line
