"""A recipe says what it means, or is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smolstack.errors import ConfigError
from smolstack.train import Recipe

GOOD: dict[str, Any] = {
    "output": "run",
    "data": {"train": "train.jsonl"},
    "stages": [{"train": "connector", "steps": 5}],
}


def test_a_toml_file_becomes_a_recipe_with_paths_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        output = "runs/first"
        model = "model"
        seed = 7
        [data]
        train = "train.jsonl"
        max_image_tokens = 128
        [[stages]]
        train = "connector"
        epochs = 2
        learning_rate = 1e-3
        [[stages]]
        train = "lora"
        steps = 10
        learning_rates = { text = 1e-4 }
        lora = { modules = ["decoder.*"], rank = 4 }
        """,
        encoding="utf-8",
    )
    recipe = Recipe.read(path)
    assert recipe.output == str(tmp_path / "runs/first")
    assert recipe.model == str(tmp_path / "model")
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert [stage.train for stage in recipe.stages] == ["connector", "lora"]
    assert recipe.stages[1].lora.rank == 4
    assert recipe.stages[1].learning_rates == {"text": 1e-4}
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_hub_id_stays_a_hub_id(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({**GOOD, "model": "someone/model"}, base=tmp_path)
    assert recipe.model == "someone/model"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sed": 1}, "unknown key 'sed'"),
        ({"output": 3}, "output is 3, expected a string"),
        ({"stages": []}, r"at least one \[\[stages\]\]"),
        ({"autocast": "float8"}, r"autocast is 'float8', expected one of"),
        ({"vision_dtype": "int4"}, r"vision_dtype is 'int4', expected one of"),
        (
            {"vision_dtype": "int8", "stages": [{"train": "full", "steps": 1}]},
            "every stage trains the vision tower",
        ),
        ({"data": {}}, "data.train"),
        ({"data": {"train": "x", "max_tokens": -1}}, "data.max_tokens is -1"),
        ({"stages": [{"train": "head", "steps": 1}]}, r"stages\[0\].train is 'head'"),
        ({"stages": [{"train": "full"}]}, "steps or epochs"),
        ({"stages": [{"train": "full", "steps": 1, "epochs": 1}]}, "steps or epochs"),
        ({"stages": [{"train": "full", "steps": True}]}, "expected an integer"),
        ({"stages": [{"train": "full", "steps": 1, "learning_rates": {"tower": 1}}]}, "tower"),
        ({"stages": [{"train": "lora", "steps": 1, "lora": {"rank": 0}}]}, "lora.rank is 0"),
        (
            {"stages": [{"train": "connector", "steps": 1, "keep_language": 1}]},
            r"stages\[0\].keep_language is 1.0, expected 0 where train is 'connector'",
        ),
        (
            {"stages": [{"train": "lora", "steps": 1, "keep_language": -1}]},
            r"keep_language is -1.0, expected 0 or more",
        ),
        ({"stages": [{"steps": 1}]}, "has no train"),
    ],
)
def test_what_has_no_meaning_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict({**GOOD, **change})


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(ConfigError, match="is not a file"):
        Recipe.read(path)
    path.write_text("output = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        Recipe.read(path)
