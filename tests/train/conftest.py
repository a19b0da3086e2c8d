"""Small training runs: a tiny model and images drawn on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from PIL import Image, ImageDraw, ImageFont

from smolstack.train import Recipe

MakeRecipe: TypeAlias = Callable[..., Recipe]
ANSWERS = ("12", "7 and 8", "none", "345", "9", "a b", "66", "one two", "4", "31")


def draw(text: str, seed: int) -> Image.Image:
    """A small image of a text."""
    rng = random.Random(seed)
    image = Image.new("RGB", (64, 40), rng.choice(["white", "lightyellow", "lightblue"]))
    font = ImageFont.load_default(rng.randint(12, 18))
    ImageDraw.Draw(image).text((rng.randint(1, 9), rng.randint(1, 15)), text, "black", font)
    return image


def chat(image: Any, answer: str, question: str = "What does it say?") -> dict[str, Any]:
    """One line of a JSONL file, as TRL and transformers have it."""
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train.jsonl`` and ``images/``, ten examples each; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    lines = []
    for number, answer in enumerate(ANSWERS):
        path = folder / "images" / f"{number}.png"
        draw(answer, number).save(path)
        path.with_suffix(".txt").write_text(answer + "\n", encoding="utf-8")
        lines.append(json.dumps(chat(f"images/{path.name}", answer)) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def make_recipe(tiny_folder: Path, data: Path, tmp_path: Path) -> MakeRecipe:
    """``make_recipe(stage={…}, …)``: one stage on the tiny model, one tile per image."""

    def make(stage: dict[str, Any] | None = None, **values: Any) -> Recipe:
        chosen = {"train": "connector", "steps": 3, "batch": 4, "micro_batch": 2, "warmup": 0}
        chosen |= {"learning_rate": 1e-3, **(stage or {})}
        source = {"train": str(data / "train.jsonl"), "split": False, **values.pop("data", {})}
        base = {"output": str(tmp_path / "run"), "model": str(tiny_folder), "stages": [chosen]}
        return Recipe.from_dict({**base, "evaluation": {"answers": 0}, **values, "data": source})

    return make
