"""Images with something to read, questions about them and answers in whole sentences.

Papers, damage, fonts and words are those of the reader's generator (training/reader). Strings and
font families of the split "held-out" are never trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from training.reader import fonts, paper, text

EDGE = 256  # pixels of an image's side, about; a tile of the reader sees half of them
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
class Asked:
    """One image, a question about it and its answer.

    Attributes:
        kind: of question.
        lines: what stands in the image.
    """

    kind: str
    lines: tuple[str, ...]
    question: str
    answer: str


def draw_asked(rng: random.Random, split: str) -> Asked:
    """A question of a kind, each as likely as another."""
    return rng.choice(list(KINDS.values()))(rng, split)


def _number(rng: random.Random, split: str) -> Asked:
    found = _digits(rng, split)
    forms = {
        "What number is this?": f"It is {found}.",
        "Read the number.": f"The number is {found}.",
        "Which number do you see in the image?": f"I see the number {found}.",
    }
    return _ask(rng, "number", (found,), forms)


def _two_numbers(rng: random.Random, split: str) -> Asked:
    one, other = _digits(rng, split), _digits(rng, split)
    while int(one) == int(other):
        other = _digits(rng, split)
    small, large = sorted((one, other), key=int)
    forms = {
        "Which number is larger?": f"{large} is larger than {small}.",
        "Which of the two numbers is smaller?": f"{small} is smaller than {large}.",
        "Which two numbers are these?": f"They are {one} and {other}.",
    }
    return _ask(rng, "two numbers", (one, other), forms)


def _word(rng: random.Random, split: str) -> Asked:
    found = _known_word(rng, split)
    forms = {
        "What does it say?": f"It says {found}.",
        "Write what it says in capitals.": found.upper(),
        "Which word is this?": f"The word is {found}.",
        "What is the first letter?": f"The first letter is {found[0]}.",
    }
    return _ask(rng, "word", (found,), forms)


def _is_price(rng: random.Random, split: str) -> Asked:
    kind = rng.random()
    found = _price(rng, split) if kind < 0.5 else _known_word(rng, split)
    if kind > 0.8:
        found = _digits(rng, split)
    yes, no = f"Yes, it is a price: {found}.", f"No, it says {found}."
    answer = yes if kind < 0.5 else no
    forms = {"Is this a price?": answer, "Does the image show a price?": answer}
    return _ask(rng, "price or not", (found,), forms)


def _receipt(rng: random.Random, split: str) -> Asked:
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
    return _ask(rng, "receipt", (*lines, f"total {total}"), forms)


def _label(rng: random.Random, split: str) -> Asked:
    place, found = rng.choice(PLACES), _digits(rng, split, longest=3)
    forms = {
        f"Which {place} is it?": f"It is {place} {found}.",
        "What is this the label of?": f"It is the label of {place} {found}.",
    }
    return _ask(rng, "label", (place, found), forms)


KINDS: dict[str, Callable[[random.Random, str], Asked]] = {
    "number": _number,
    "two numbers": _two_numbers,
    "word": _word,
    "price or not": _is_price,
    "receipt": _receipt,
    "label": _label,
}


def _ask(rng: random.Random, kind: str, lines: tuple[str, ...], forms: dict[str, str]) -> Asked:
    question, answer = rng.choice(list(forms.items()))
    return Asked(kind, lines, question, answer)


def _digits(rng: random.Random, split: str, longest: int = 5) -> str:
    while True:
        found = str(rng.randrange(10 ** rng.randint(1, longest)))
        if len(found) < 2 or text.is_held_out(found) == (split == "held-out"):
            return found


def _price(rng: random.Random, split: str) -> str:
    while True:
        found = f"${rng.randrange(1, 20)}.{rng.randrange(0, 100, 5):02d}"
        if text.is_held_out(found) == (split == "held-out"):
            return found


def _known_word(rng: random.Random, split: str) -> str:
    common, known = text.words(split)
    words = common if rng.random() < 0.5 else known
    return rng.choice([word for word in rng.sample(words, 16) if len(word) < 9] or ["bread"])


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def draw_image(rng: random.Random, split: str, lines: tuple[str, ...]) -> Image.Image:
    """The lines under each other, in one font, as large as they fit or somewhat smaller."""
    size = EDGE, round(EDGE * rng.uniform(0.6, 1.0))
    ink, ground = paper.choose_colors(rng)
    image = paper.draw_background(rng, size, ground)
    font, (width, height) = _fitting(rng, split, lines, size)
    left = rng.uniform(4, max(4.0, size[0] - width - 4))
    top = rng.uniform(4, max(4.0, size[1] - height - 4))
    drawing = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        drawing.text((left, top + number * height / len(lines)), line, fill=ink, font=font)
    return paper.damage(rng, image, width / max(map(len, lines)))


def _fitting(
    rng: random.Random, split: str, lines: tuple[str, ...], size: tuple[int, int]
) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, tuple[float, float]]:
    """A font of a split, and the width and height of the lines in it."""
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
    """``count`` images and asked.jsonl with a chat about each; what is drawn already stays.

    Every example has a seed of its own, so a run that was stopped goes on with the same images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        rng = random.Random(f"{seed} {split} {number}")
        asked = draw_asked(rng, split)
        file = folder / f"{number:05d}.png"
        if not file.is_file():
            unfinished = file.with_suffix(".part")
            draw_image(rng, split, asked.lines).save(unfinished, "PNG")
            unfinished.replace(file)
        rows.append(json.dumps(chat_of(asked, file.name), ensure_ascii=False) + "\n")
    (folder / "asked.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "asked.jsonl"


def chat_of(asked: Asked, file: str) -> dict[str, object]:
    """A line of asked.jsonl, as ``smolstack train`` reads it."""
    shown: list[dict[str, str]] = [{"type": "image", "image": file}]
    return {
        "kind": asked.kind,
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": asked.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": asked.answer}]},
        ],
    }
