"""smolstack train: a recipe in, a run folder out; refusals in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import draw

import smolstack

Run = Callable[..., Any]


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe beside a folder of two images."""
    (tmp_path / "images").mkdir()
    for answer in ("12", "7"):
        draw(answer, 1).save(tmp_path / "images" / f"{answer}.png")
        (tmp_path / "images" / f"{answer}.txt").write_text(answer)
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        output = "run"
        model = "{tiny_folder}"
        [data]
        train = "images"
        evaluation = "images"
        split = false
        [evaluation]
        max_new_tokens = 4
        [[stages]]
        train = "connector"
        steps = 2
        batch = 2
        """,
        encoding="utf-8",
    )
    return path


def test_a_recipe_becomes_a_checkpoint_that_answers(run: Run, recipe: Path, tmp_path: Path) -> None:
    result = run("train", recipe)
    assert result.exit_code == 0, result.stderr
    assert str(tmp_path / "run" / "model") in result.stdout
    assert "answers exact" in result.stdout
    assert "2 examples, " in result.stderr
    assert "contribute to the loss" in result.stderr
    assert "Assistant:⟦ 12<end_of_utterance>⟧" in result.stderr
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {"metrics.jsonl", "loss.png", "evaluation.png", "checkpoints", "model"}
    assert smolstack.load(tmp_path / "run" / "model").ask(text="Hi", max_new_tokens=1)


def test_a_finished_run_is_kept_until_something_is_said(
    run: Run, refuses: Run, recipe: Path
) -> None:
    assert run("train", recipe, "--quiet").exit_code == 0
    said = refuses("train", recipe)
    assert "contains an earlier run" in said
    assert "(--resume) continues it, overwrite=True (--overwrite) removes it" in said
    assert run("train", recipe, "--resume", "--quiet").exit_code == 0
    again = run("train", recipe, "--overwrite", "--quiet")
    assert again.exit_code == 0
    assert again.stderr == ""


def test_bad_recipes_and_data_are_refused_in_a_sentence(
    run: Run, refuses: Run, recipe: Path, tmp_path: Path
) -> None:
    assert "is not a file" in refuses("train", tmp_path / "none.toml")
    good = recipe.read_text()
    recipe.write_text(good.replace('"connector"', '"everything"'))
    assert "expected one of ['connector'" in refuses("train", recipe)
    recipe.write_text(good.replace('train = "images"', 'train = "nowhere"'))
    assert "nowhere does not exist" in refuses("train", recipe)
    recipe.write_text(good.replace("split = false", "split = false\nmax_tokens = 10"))
    told = run("train", recipe, "--quiet")
    assert told.exit_code == 2
    assert "12.png has" in told.stderr
    assert "the limit is 10" in told.stderr


def test_the_frozen_towers_precision_can_be_given(
    run: Run, refuses: Run, recipe: Path, tmp_path: Path
) -> None:
    assert "vision_dtype is 'int4'" in refuses("train", recipe, "--vision-dtype", "int4")
    result = run("train", recipe, "--vision-dtype", "int8", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert '"vision_dtype": "int8"' in (tmp_path / "run" / "recipe.json").read_text()


def test_only_adapters_can_keep_the_language(refuses: Run, recipe: Path) -> None:
    told = refuses("train", recipe, "--keep-language", "1")
    assert "keep_language needs a lora stage, the recipe's train ['connector']" in told
