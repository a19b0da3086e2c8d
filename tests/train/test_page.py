"""docs/training.md says what works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from tests.train.conftest import ANSWERS, draw

from smolstack.family import PRESETS
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train import Recipe
from smolstack.train.trainable import adapted_layers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_the_recipes_of_the_page_are_recipes() -> None:
    with torch.device("meta"):
        model = VisionLanguageModel(PRESETS["smolvlm-256m"].config)
    recipes = [Recipe.from_dict(tomllib.loads(text)) for text in blocks("toml")]
    assert recipes
    for recipe in recipes:
        for stage in recipe.stages:
            if stage.train == "lora":
                assert adapted_layers(model, stage.lora)


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images", "test"):
        (tmp_path / name).mkdir()
        for number, answer in enumerate(ANSWERS[:2]):
            image = tmp_path / name / f"{number}.png"
            draw(answer, number).save(image)
            image.with_suffix(".txt").write_text(answer, encoding="utf-8")
    text = "\n".join(blocks("python"))
    assert "steps=500, batch=16" in text
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(text.replace("steps=500, batch=16", "steps=1, batch=2"), "page", "exec"), names)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
