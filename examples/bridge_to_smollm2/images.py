"""Synthetic images of text, with questions and answers in complete sentences.

Backgrounds, degradations, fonts and words are those of the reader's generator (training/reader).
Strings and font families of the split "held-out" are not used for training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from training.reader import fonts, paper, text

IMAGE_SIZE = 256  # approximate image width in pixels; twice the reader's tile size
GOODS = [
    "tea",
    "bread",
    "milk",
    "cake",
    "soup",
    "rice",
    "fish",
    "jam",
    "eggs",
    "nuts",
    "salt",
    "ham",
]
PLACES = ["room", "platform", "gate", "bus", "door", "seat"]


@dataclass(frozen=True)
class ImageQuestion:
    """The text of an image, a question about it and its answer.

    Attributes:
        kind: the kind of question.
        lines: the text in the image.
    """

    kind: str
    lines: tuple[str, ...]
    question: str
    answer: str


def random_question(rng: random.Random, split: str) -> ImageQuestion:
    """Return a question of a random kind."""
    return rng.choice(list(KINDS.values()))(rng, split)


def _number(rng: random.Random, split: str) -> ImageQuestion:
    value = _digits(rng, split)
    forms = {
        "What number is this?": f"It is {value}.",
        "Read the number.": f"The number is {value}.",
        "Which number do you see in the image?": f"I see the number {value}.",
    }
    return _random_form(rng, "number", (value,), forms)


def _two_numbers(rng: random.Random, split: str) -> ImageQuestion:
    first, second = _digits(rng, split), _digits(rng, split)
    while int(first) == int(second):
        second = _digits(rng, split)
    small, large = sorted((first, second), key=int)
    forms = {
        "Which number is larger?": f"{large} is larger than {small}.",
        "Which of the two numbers is smaller?": f"{small} is smaller than {large}.",
        "Which two numbers are these?": f"They are {first} and {second}.",
    }
    return _random_form(rng, "two numbers", (first, second), forms)


def _word(rng: random.Random, split: str) -> ImageQuestion:
    value = _random_word(rng, split)
    forms = {
        "What does it say?": f"It says {value}.",
        "Write what it says in capitals.": value.upper(),
        "Which word is this?": f"The word is {value}.",
        "What is the first letter?": f"The first letter is {value[0]}.",
    }
    return _random_form(rng, "word", (value,), forms)


def _is_price(rng: random.Random, split: str) -> ImageQuestion:
    kind = rng.random()
    value = _price(rng, split) if kind < 0.5 else _random_word(rng, split)
    if kind > 0.8:
        value = _digits(rng, split)
    yes, no = f"Yes, it is a price: {value}.", f"No, it says {value}."
    answer = yes if kind < 0.5 else no
    forms = {"Is this a price?": answer, "Does the image show a price?": answer}
    return _random_form(rng, "price or not", (value,), forms)


def _receipt(rng: random.Random, split: str) -> ImageQuestion:
    goods = rng.sample(GOODS, rng.randint(2, 3))
    prices = [_price(rng, split) for _ in goods]
    total = f"${sum(round(float(p[1:]) * 100) for p in prices) / 100:.2f}"
    lines = [f"{name} {price}" for name, price in zip(goods, prices, strict=True)]
    number = rng.randrange(len(goods))
    forms = {
        "What is the total?": f"The total is {total}.",
        "How much is it altogether?": f"Altogether it is {total}.",
        f"How much is the {goods[number]}?": f"The {goods[number]} is {prices[number]}.",
        "What was bought?": f"{_listed(goods).capitalize()}.",
    }
    return _random_form(rng, "receipt", (*lines, f"total {total}"), forms)


def _label(rng: random.Random, split: str) -> ImageQuestion:
    place, value = rng.choice(PLACES), _digits(rng, split, longest=3)
    forms = {
        f"Which {place} is it?": f"It is {place} {value}.",
        "What is this the label of?": f"It is the label of {place} {value}.",
    }
    return _random_form(rng, "label", (place, value), forms)


KINDS: dict[str, Callable[[random.Random, str], ImageQuestion]] = {
    "number": _number,
    "two numbers": _two_numbers,
    "word": _word,
    "price or not": _is_price,
    "receipt": _receipt,
    "label": _label,
}


def _random_form(
    rng: random.Random, kind: str, lines: tuple[str, ...], forms: dict[str, str]
) -> ImageQuestion:
    question, answer = rng.choice(list(forms.items()))
    return ImageQuestion(kind, lines, question, answer)


def _digits(rng: random.Random, split: str, longest: int = 5) -> str:
    while True:
        value = str(rng.randrange(10 ** rng.randint(1, longest)))
        if len(value) < 2 or text.is_held_out(value) == (split == "held-out"):
            return value


def _price(rng: random.Random, split: str) -> str:
    while True:
        value = f"${rng.randrange(1, 20)}.{rng.randrange(0, 100, 5):02d}"
        if text.is_held_out(value) == (split == "held-out"):
            return value


def _random_word(rng: random.Random, split: str) -> str:
    common, known = text.words(split)
    words = common if rng.random() < 0.5 else known
    return rng.choice([word for word in rng.sample(words, 16) if len(word) < 9] or ["bread"])


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def draw_image(rng: random.Random, split: str, lines: tuple[str, ...]) -> Image.Image:
    """Draw lines of text in one font, at 70 to 95 % of the largest size that fits."""
    size = IMAGE_SIZE, round(IMAGE_SIZE * rng.uniform(0.6, 1.0))
    ink, background = paper.choose_colors(rng)
    image = paper.draw_background(rng, size, background)
    font, (width, height) = _fit_font(rng, split, lines, size)
    left = rng.uniform(4, max(4.0, size[0] - width - 4))
    top = rng.uniform(4, max(4.0, size[1] - height - 4))
    drawing = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        drawing.text((left, top + number * height / len(lines)), line, fill=ink, font=font)
    return paper.damage(rng, image, width / max(map(len, lines)))


def _fit_font(
    rng: random.Random, split: str, lines: tuple[str, ...], size: tuple[int, int]
) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, tuple[float, float]]:
    """Return a font of a split, and the width and height of the lines in it."""
    known = fonts.families(split)
    file = rng.choice(known[rng.choice(list(known))]) if known else None
    share = rng.uniform(0.7, 0.95)
    points = 72.0
    for _ in range(3):
        font = ImageFont.truetype(file, points) if file else ImageFont.load_default(points)
        width = max(font.getlength(line) for line in lines)
        height = 1.3 * points * len(lines)
        points *= share * min((size[0] - 8) / width, (size[1] - 8) / height)
    return font, (width, height)


def draw_folder(folder: Path, count: int, *, split: str, seed: int) -> Path:
    """Draw ``count`` images and write asked.jsonl with a chat about each; existing ones are kept.

    Each example has its own seed, so an interrupted run continues with the same images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        rng = random.Random(f"{seed} {split} {number}")
        question = random_question(rng, split)
        file = folder / f"{number:05d}.png"
        if not file.is_file():
            unfinished = file.with_suffix(".part")
            draw_image(rng, split, question.lines).save(unfinished, "PNG")
            unfinished.replace(file)
        rows.append(json.dumps(to_chat(question, file.name), ensure_ascii=False) + "\n")
    (folder / "asked.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "asked.jsonl"


def to_chat(question: ImageQuestion, file: str) -> dict[str, object]:
    """Return a line of asked.jsonl, in the format of ``smolstack train``."""
    shown: list[dict[str, str]] = [{"type": "image", "image": file}]
    return {
        "kind": question.kind,
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": question.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        ],
    }
