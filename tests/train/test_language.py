"""``keep_language``: a stage of adapters that leaves text-only answers as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import MakeRecipe
from tests.train.test_objective import LENGTHS, mixed
from tests.train.test_processes import in_two_processes

import smolstack
from smolstack.errors import ConfigError, DataError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train import objective, train
from smolstack.train.adapters import add_adapters
from smolstack.train.metrics import read_metrics
from smolstack.train.objective import AnswerLoss
from smolstack.train.recipe import Lora, Recipe, Stage
from smolstack.train.trainable import freeze

LORA: dict[str, Any] = {"modules": ["decoder"], "connector": True}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good morning"}]


@pytest.fixture
def model(tiny_folder: Path) -> VisionLanguageModel:
    """A model whose adapters already change its answers."""
    found = smolstack.load(tiny_folder, dtype="float32").model.train()
    lora = Lora(("decoder",))
    add_adapters(found, lora, seed=0)
    freeze(found, Stage("lora", steps=1, lora=lora))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if ".lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return found


def gradients(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def expected_divergence(model: VisionLanguageModel) -> torch.Tensor:
    """KL(without adapters ‖ with them), from its definition, row by row."""
    batch, total = mixed(), torch.zeros(())
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "enable_adapters")]
    for row, length in enumerate(LENGTHS):
        embeddings = model.decoder.embedding(batch.token_ids[row : row + 1, :length])
        for layer in layers:
            layer.enable_adapters(False)
        with torch.no_grad():
            before = model.logits(model.decoder(embeddings)).softmax(-1)
        for layer in layers:
            layer.enable_adapters(True)
        now = model.logits(model.decoder(embeddings)).softmax(-1)
        total = total + (before * (before.log() - now.log()))[0, 1:-1].sum()
    return total


@pytest.mark.parametrize("chunk", [256, 3])
def test_the_divergence_is_added_with_its_weight(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    plain = AnswerLoss(model)(mixed())
    expected = expected_divergence(model)
    (plain + 2.5 * expected).backward()
    wanted = gradients(model)
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", chunk)
    loss = AnswerLoss(model, keep_language=2.5)
    found = loss(mixed())
    found.backward()
    assert float(expected.detach()) > 0.1
    assert float(found.detach()) == pytest.approx(
        float((plain + 2.5 * expected).detach()), rel=1e-4
    )
    assert loss.language.tolist() == [
        pytest.approx(float(expected.detach()), rel=1e-4),
        sum(LENGTHS) - 2 * len(LENGTHS),
    ]
    found_gradients = gradients(model)
    assert set(found_gradients) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-4, rtol=1e-3)


def test_evaluation_is_of_the_answers_alone(model: VisionLanguageModel) -> None:
    model.eval()
    with torch.no_grad():
        assert float(AnswerLoss(model, keep_language=2.5)(mixed())) == pytest.approx(
            float(AnswerLoss(model)(mixed()))
        )


@pytest.fixture
def mixed_data(data: Path, tmp_path: Path) -> Path:
    lines = (data / "train.jsonl").read_text().replace("images/", f"{data}/images/")
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + lines, encoding="utf-8")
    return path


def stage(keep: float, **values: Any) -> dict[str, Any]:
    common = {"train": "lora", "lora": LORA, "keep_language": keep, "learning_rate": 2e-2}
    return {**common, "steps": 12, "batch": 11, "micro_batch": 11, **values}


def last_divergence(recipe: Recipe) -> float:
    lines = read_metrics(Path(recipe.output) / "metrics.jsonl")
    assert lines[0]["language_kl"] == pytest.approx(0, abs=1e-6)
    return float(lines[-2]["language_kl"])  # the last line is the evaluation's


def test_a_greater_weight_keeps_more_of_the_language(
    make_recipe: MakeRecipe, mixed_data: Path, data: Path
) -> None:
    found = []
    for keep in (1e-9, 20.0):
        sources = {"train": str(mixed_data), "evaluation": str(data / "images")}
        recipe = make_recipe(stage(keep), data=sources)
        train(recipe, quiet=True, overwrite=True)
        found.append(last_divergence(recipe))
    unbound, kept = found
    assert unbound > 0.05
    assert kept < unbound / 5


def test_shards_keep_it_too(make_recipe: MakeRecipe, mixed_data: Path, tmp_path: Path) -> None:
    """Only one of two processes has the example without an image."""
    runs = {}
    for name, parallel in (("one", "ddp"), ("ddp", "ddp"), ("fsdp", "fsdp")):
        runs[name] = make_recipe(
            stage(3.0, steps=3, batch=22),
            data={"train": str(mixed_data)},
            output=str(tmp_path / name),
            parallel=parallel,
        )
    train(runs["one"], quiet=True)
    in_two_processes(tmp_path, runs["ddp"], runs["fsdp"])
    keys = ("loss", "gradient_norm", "language_kl")
    logs = {
        name: [
            [line[key] for key in keys]
            for line in read_metrics(Path(recipe.output) / "metrics.jsonl")
        ]
        for name, recipe in runs.items()
    }
    for name in ("ddp", "fsdp"):
        for ours, theirs in zip(logs[name], logs["one"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_data_of_images_alone_cannot_keep_it(make_recipe: MakeRecipe) -> None:
    with pytest.raises(DataError, match="all 10 training examples have an image, but keep_lang"):
        train(make_recipe(stage(1.0)), quiet=True)


def test_adapters_outside_the_text_tower_cannot_change_it(
    make_recipe: MakeRecipe, mixed_data: Path
) -> None:
    change = {"lora": {"modules": ["vision"]}}
    recipe = make_recipe(stage(1.0, **change), data={"train": str(mixed_data)})
    with pytest.raises(ConfigError, match=r"keep_language is 1, expected 0: the adapters on "):
        train(recipe, quiet=True)


def test_the_command_sets_it_for_adapters_alone(
    make_recipe: MakeRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(data={"train": str(mixed_data)})
    with pytest.raises(ConfigError, match=r"keep_language needs a lora stage.*\['connector'\]"):
        recipe.keeping_language(1.0)
    both = Recipe.from_dict(
        {**recipe.to_dict(), "stages": [recipe.to_dict()["stages"][0], stage(0.0)]}
    )
    assert [s.keep_language for s in both.keeping_language(2.0).stages] == [0.0, 2.0]
