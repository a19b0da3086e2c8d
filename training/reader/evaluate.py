"""Measure the reader on images whose fonts and strings training never saw.

Goes through the public API, as a user would, and asks tesseract about the same images. Prints and
writes (JSON) exact answers and character error rates, in all and by length, line count, size and
font family, for each question; draws a sheet of images with their answers, wrong ones first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smolstack
from smolstack.vlm import VLM
from training.reader import shape
from training.reader.images import DrawnImage, draw_image
from training.reader.pointing import Question
from training.reader.scores import (
    Result,
    ask_tesseract,
    by,
    draw_sheet,
    figures,
    tesseract_version,
    tidy,
)

FIRST_SEED = 900_000_000
WIDTHS = (0, 12, 16, 24, 36, 1000)  # bounds of classes of character width, in tile pixels
LENGTHS = (1, 5, 9, 17, 25)  # bounds of classes of line length
NEW_TOKENS = 260
TARGETS = {
    "one line of up to 16 characters": (0.90, 0.03),
    "one line of up to 24 characters": (0.0, 0.06),
    "blocks of two to four lines": (0.0, 0.06),
}


@dataclass(frozen=True)
class Read(Result):
    """A result and the image that it belongs to."""

    drawn: DrawnImage | None = None

    @property
    def lines(self) -> int:
        return 0 if self.drawn is None else len(self.drawn.lines)

    @property
    def family(self) -> str:
        return "" if self.drawn is None else self.drawn.family


def read_images(vlm: VLM, count: int, split: str) -> tuple[list[Read], list[Read]]:
    """Answers about the first ``count`` images of a split.

    Each is asked for all of its text. Every third is also asked how many lines there are, or for
    one of them.
    """
    read, asked = [], []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        image = draw_image(seed, split)
        read.append(_ask(vlm, image, Question(shape.QUESTION), tesseract=True))
        if seed % 3 == 0:
            rng = random.Random(f"question {seed}")
            line = rng.choice((-1, rng.randint(1, max(1, len(image.lines)))))
            words = "How many lines?" if line < 0 else f"Read line {line}"
            asked.append(_ask(vlm, image, Question(words, line)))
    return read, asked


def _ask(vlm: VLM, image: DrawnImage, question: Question, tesseract: bool = False) -> Read:
    answer = vlm.ask(image.image, question.words, max_new_tokens=NEW_TOKENS).text
    other = ask_tesseract(image.image) if tesseract else None
    truth = question.answer(image.lines)
    return Read(image.image, question.words, truth, tidy(answer), other, image)


def report(read: list[Read], asked: list[Read]) -> dict[str, Any]:
    """Every figure, as written to the JSON file."""
    text = [result for result in read if result.lines]
    single = [result for result in text if result.lines == 1]
    lines = [r for r in asked if r.question.startswith("Read line")]
    return {
        "one line of up to 16 characters": figures(r for r in single if len(r.truth) <= 16),
        "one line of up to 24 characters": figures(single),
        "blocks of two to four lines": figures(r for r in text if r.lines > 1),
        "no text": figures(r for r in read if not r.lines),
        "how many lines?": figures(r for r in asked if r.question == "How many lines?"),
        "read line N": figures(lines),
        "by line count": by(text, lambda r: str(r.lines)),
        "one line, by length": by(
            single, lambda r: _class(len(r.truth), LENGTHS, "characters", whole=True)
        ),
        "by character width on the tiles": by(text, _width),
        "by font family": by(text, lambda r: r.family),
        "tesseract": tesseract_version() or "not installed",
    }


def _width(result: Read) -> str | None:
    return None if result.drawn is None else _class(result.drawn.width, WIDTHS, "px")


def _class(value: float, bounds: tuple[int, ...], unit: str, *, whole: bool = False) -> str:
    """The class of a value, such as "12-16 px"; of a whole number, its last one included."""
    for low, high in itertools.pairwise(bounds):
        if low <= value < high:
            return (
                f"{low:02d} {unit} and more"
                if high >= 1000
                else f"{low:02d}-{high - whole:02d} {unit}"
            )
    raise ValueError(f"{value} {unit} is outside {bounds[0]} to {bounds[-1]}")


def verdict(found: dict[str, Any]) -> list[str]:
    """One sentence for each target."""
    said = []
    for name, (exact, cer) in TARGETS.items():
        met = found[name]["exact"] >= exact and found[name]["cer"] <= cer
        wanted = f"exact {exact:.0%}, error rate {cer:.0%}" if exact else f"error rate {cer:.0%}"
        said.append(
            f"{name}: {'met' if met else 'NOT met'}: exact {found[name]['exact']:.1%}, "
            f"error rate {found[name]['cer']:.1%} (target: {wanted})"
        )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder; the bundled reader if left out")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--split", default="held-out", choices=["held-out", "train"])
    parser.add_argument("--out", type=Path, default=Path(".cache/reader/evaluation"))
    options = parser.parse_args()
    vlm = smolstack.load() if options.model is None else smolstack.load(options.model)
    started = time.monotonic()
    read, asked = read_images(vlm, options.count, options.split)
    found = report(read, asked)
    found["seconds"] = round(time.monotonic() - started, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2)
    (options.out / f"{options.split}.json").write_text(text + "\n", encoding="utf-8")
    draw_sheet([*read[: len(read) // 2], *asked], options.out / f"{options.split}.png")
    print(text)
    print("\n".join(verdict(found)))


if __name__ == "__main__":
    main()
