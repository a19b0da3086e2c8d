"""Measure the reader on pictures whose fonts and numbers training never saw.

Goes through the public API, as a user would. Prints and writes (JSON) the share of pictures
answered exactly, in all and per length, size, font family; draws a sheet of pictures with their
answers, wrong ones first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import smolstack
from training.reader import shape
from training.reader.pictures import Picture, draw_picture

FIRST_SEED = 900_000_000
WIDTHS = (0, 8, 10, 14, 20, 30, 1000)  # bounds of classes of digit width, in tile pixels
READABLE = 14  # tile pixels; a digit narrower than that is hardly more than one patch
CELL = (180, 150)


@dataclass(frozen=True)
class Result:
    """A picture, the truth and the reader's answer."""

    picture: Picture
    answer: str

    @property
    def truth(self) -> str:
        return self.picture.text or shape.NOTHING

    @property
    def exact(self) -> bool:
        return self.answer == self.truth


def read_pictures(model: str | None, count: int, split: str) -> list[Result]:
    """Answers to the first ``count`` pictures of a split."""
    vlm = smolstack.load() if model is None else smolstack.load(model)
    results = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        picture = draw_picture(seed, split)
        answer = vlm.ask(picture.image, shape.QUESTION, max_new_tokens=12)
        results.append(Result(picture, answer.text.strip()))
    return results


def share(results: Iterable[Result]) -> dict[str, float | int]:
    """Exact answers as a share of all, with their number."""
    right = [result.exact for result in results]
    return {"exact": round(sum(right) / max(1, len(right)), 4), "pictures": len(right)}


def by(results: list[Result], key: Callable[[Result], str]) -> dict[str, dict[str, float | int]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return {name: share(groups[name]) for name in sorted(groups)}


def width_class(result: Result) -> str:
    """The class of a picture's digit width, such as "10-14 px"."""
    width = result.picture.digit_width
    low, high = next((low, high) for low, high in itertools.pairwise(WIDTHS) if low <= width < high)
    return f"{low:02d}-{high:02d} px" if high < 1000 else f"{low:02d} px and more"


def report(results: list[Result]) -> dict[str, Any]:
    """Every figure, as written to the JSON file."""
    numbers = [result for result in results if result.picture.text]
    empty = [result for result in results if not result.picture.text]
    return {
        "numbers": share(numbers),
        f"numbers, digits at least {READABLE} px wide": share(
            r for r in numbers if r.picture.digit_width >= READABLE
        ),
        "no number": share(empty),
        "by length": by(numbers, lambda r: str(len(r.picture.text))),
        "by digit width on the tile": by(numbers, width_class),
        "by font family": by(numbers, lambda r: r.picture.family),
    }


def draw_sheet(results: list[Result], path: Path, columns: int = 6, rows: int = 5) -> None:
    """Pictures with truth and answer; wrong answers first and in red, at most half the sheet."""
    wrong = [r for r in results if not r.exact][: columns * rows // 2]
    right = [r for r in results if r.exact][: columns * rows - len(wrong)]
    sheet = Image.new("RGB", (columns * CELL[0], rows * CELL[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for index, result in enumerate([*wrong, *right]):
        x, y = index % columns * CELL[0], index // columns * CELL[1]
        small = result.picture.image.copy()
        small.thumbnail((CELL[0] - 12, CELL[1] - 30))
        sheet.paste(small, (x + 6, y + 4))
        draw.rectangle((x + 5, y + 3, x + 6 + small.width, y + 4 + small.height), outline="grey")
        text = result.answer if result.exact else f"{result.answer}  (is {result.truth})"
        color = "darkgreen" if result.exact else "crimson"
        draw.text((x + 6, y + CELL[1] - 24), text, color, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder; the bundled reader if left out")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--split", default="held-out", choices=["held-out", "train"])
    parser.add_argument("--out", type=Path, default=Path(".cache/reader/evaluation"))
    options = parser.parse_args()
    started = time.monotonic()
    results = read_pictures(options.model, options.count, options.split)
    figures = report(results)
    figures["seconds"] = round(time.monotonic() - started, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2)
    (options.out / f"{options.split}.json").write_text(text + "\n", encoding="utf-8")
    draw_sheet(results, options.out / f"{options.split}.png")
    print(text)


if __name__ == "__main__":
    main()
