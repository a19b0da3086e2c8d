"""Scores of answers against the truth, in all and by groups; and tesseract's answers."""

from __future__ import annotations

import io
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import jiwer
from PIL import Image, ImageDraw, ImageFont

ENLARGED = 1000  # pixels: tesseract wants capitals of 30 pixels, so smaller images are enlarged
CELL = (220, 150)

Figures = dict[str, float | int]


@dataclass(frozen=True)
class Result:
    """An image, the question, the truth, and the answers of the reader and of tesseract."""

    image: Image.Image
    question: str
    truth: str
    answer: str
    other: str | None = None

    @property
    def exact(self) -> bool:
        return self.answer == self.truth


AnyResult = TypeVar("AnyResult", bound=Result)


def figures(results: Iterable[Result]) -> Figures:
    """Exact answers as a share, character error rate, the number of images; tesseract's too.

    The character error rate counts insertions, deletions and exchanges over all characters of the
    truth; line ends are characters.
    """
    results = list(results)
    if not results:
        return {"images": 0}
    truths = [result.truth for result in results]
    found: Figures = {
        "exact": round(sum(result.exact for result in results) / len(results), 4),
        "cer": error_rate(truths, [result.answer for result in results]),
        "images": len(results),
    }
    others = [result.other for result in results if result.other is not None]
    if len(others) == len(results):
        right = sum(other == truth for other, truth in zip(others, truths, strict=True))
        found["tesseract exact"] = round(right / len(results), 4)
        found["tesseract cer"] = error_rate(truths, others)
    return found


def error_rate(truths: Sequence[str], answers: Sequence[str]) -> float:
    """Edits over characters of the truth, all images taken together."""
    return round(float(jiwer.cer(list(truths), list(answers))), 4)


def by(results: Iterable[AnyResult], key: Callable[[AnyResult], str | None]) -> dict[str, Figures]:
    """Figures of each group; results whose key is None are left out."""
    groups: dict[str, list[AnyResult]] = defaultdict(list)
    for result in results:
        name = key(result)
        if name is not None:
            groups[name].append(result)
    return {name: figures(groups[name]) for name in sorted(groups)}


@cache
def tesseract_version() -> str | None:
    """The version of the installed tesseract, None where there is none."""
    try:
        said = subprocess.run(["tesseract", "--version"], capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return said.stdout.decode().split("\n", maxsplit=1)[0]


def ask_tesseract(image: Image.Image) -> str | None:
    """What tesseract reads in an image, as a block of text (--psm 6); None where there is none."""
    if tesseract_version() is None:
        return None
    longest = max(image.size)
    if longest < ENLARGED:
        wide, high = (round(side * ENLARGED / longest) for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    image.save(stored, "PNG")
    said = subprocess.run(
        ["tesseract", "-", "-", "--psm", "6"],
        input=stored.getvalue(),
        capture_output=True,
        check=True,
        env={"OMP_THREAD_LIMIT": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"},
    )
    return tidy(said.stdout.decode())


def tidy(text: str) -> str:
    """Lines without spaces at their ends or two in a row, and no empty ones."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def draw_sheet(
    results: Sequence[Result], path: Path, columns: int = 5, rows: int = 8, wrong: float = 0.6
) -> None:
    """Images with truth and answer; wrong answers first and in red, ``wrong`` of the sheet."""
    failed = [r for r in results if not r.exact][: round(columns * rows * wrong)]
    right = [r for r in results if r.exact][: columns * rows - len(failed)]
    shown = [*failed, *right]
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * CELL[0], max(1, rows) * CELL[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for index, result in enumerate(shown):
        x, y = index % columns * CELL[0], index // columns * CELL[1]
        small = result.image.copy()
        small.thumbnail((CELL[0] - 12, CELL[1] - 62))
        sheet.paste(small, (x + 6, y + 4))
        draw.rectangle((x + 5, y + 3, x + 6 + small.width, y + 4 + small.height), outline="grey")
        text = result.answer if result.exact else f"{result.answer}\n(is {result.truth})"
        lines = [
            line[:36] for line in text.replace("\n", " | ").replace(" | (is", "\n(is").split("\n")
        ]
        color = "darkgreen" if result.exact else "crimson"
        draw.text((x + 6, y + CELL[1] - 54), "\n".join([result.question, *lines]), color, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(path, optimize=True)
