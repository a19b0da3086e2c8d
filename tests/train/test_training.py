"""What a run promises: exact accumulation, only the chosen weights, results others can load."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.train.conftest import ANSWERS, MakeRecipe

import smolstack
from smolstack.checkpoint.diff import diff_checkpoints
from smolstack.errors import ConfigError, DataError, TrainingError
from smolstack.model.kv_cache import KVCache
from smolstack.output_files import exclusive_writer
from smolstack.train import Lora, Recipe, train
from smolstack.train.adapters import add_adapters
from smolstack.train.metrics import read_metrics
from smolstack.train.trainable import adapted_layers


def losses(recipe: Recipe) -> list[float]:
    lines = read_metrics(Path(recipe.output) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


def run(recipe: Recipe, **options: Any) -> Path:
    return train(recipe, quiet=True, **options).model


def changed_parts(before: Path, after: Path) -> set[str]:
    return {part.name for part in diff_checkpoints(before, after).parts if part.changed}


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ({"train": "connector"}, {"connector"}),
        (
            {"train": "connector+text"},
            {"connector", "token embedding", "decoder layers", "decoder norm", "head"},
        ),
        ({"train": "lora"}, {"decoder layers"}),
        (
            {"train": "lora", "lora": {"modules": ["vision.layers.0.up"], "connector": True}},
            {"vision tower", "connector"},
        ),
        (
            {"train": "full", "learning_rates": {"vision": 1e-4}},
            {
                *("vision tower", "connector", "token embedding", "decoder layers"),
                *("decoder norm", "head"),
            },
        ),
    ],
    ids=["connector", "connector+text", "lora", "lora-vision", "full"],
)
def test_a_stage_changes_what_it_says_and_the_loss_falls(
    make_recipe: MakeRecipe, tiny_folder: Path, stage: dict[str, Any], parts: set[str]
) -> None:
    recipe = make_recipe({"steps": 12, "batch": 10, "learning_rate": 5e-3, **stage})
    after = run(recipe)
    assert changed_parts(tiny_folder, after) == parts
    first, *_, last = losses(recipe)
    assert last < first - 0.05


@pytest.mark.parametrize("stage", ["connector+text", "full"])
def test_how_a_batch_is_cut_changes_nothing(make_recipe: MakeRecipe, stage: str) -> None:
    runs = []
    for size in (7, 2):
        recipe = make_recipe({"train": stage, "batch": 7, "micro_batch": size})
        run(recipe, overwrite=True)
        runs.append(losses(recipe))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"gradient_checkpointing": True}, {"cache": False}, {"data": {"workers": 1}}],
    ids=["gradient checkpointing", "no cache", "a worker"],
)
def test_these_change_nothing(make_recipe: MakeRecipe, change: dict[str, Any]) -> None:
    recipe = make_recipe({"train": "connector+text"})
    run(recipe)
    expected = losses(recipe)
    other = make_recipe({"train": "connector+text"}, **change)
    run(other, overwrite=True)
    assert losses(other) == expected


def test_bfloat16_autocast_learns_too(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"train": "full", "steps": 6, "learning_rate": 5e-3}, autocast="bfloat16")
    after = run(recipe)
    assert smolstack.load(after).dtype == torch.float32
    assert losses(recipe)[-1] < losses(recipe)[0]


def test_it_learns_answers_by_heart_and_says_so(make_recipe: MakeRecipe, data: Path) -> None:
    recipe = make_recipe(
        {"train": "full", "steps": 100, "batch": 10, "micro_batch": 10, "learning_rate": 4e-3},
        data={"evaluation": str(data / "images")},
        evaluation={"answers": 10, "every": 50, "max_new_tokens": 12},
        tensorboard=True,
    )
    trained = train(recipe, quiet=True)
    found = trained.evaluated
    assert found is not None
    assert found.exact == 1.0
    assert found.character_error_rate == 0.0
    vlm = smolstack.load(trained.model)
    for number, answer in enumerate(ANSWERS[:3]):
        path_of_image = data / "images" / f"{number}.png"
        assert vlm.ask(path_of_image, "What does it say?", split=False).text == answer
    folder = Path(recipe.output)
    evaluated = [x for x in read_metrics(folder / "metrics.jsonl") if "exact" in x]
    assert [line["step"] for line in evaluated] == [50, 100]
    for name in ("loss.png", "evaluation.png"):
        with Image.open(folder / name) as drawn:
            assert min(drawn.size) > 200
    assert list((folder / "tensorboard").iterdir())


def test_text_without_images_trains_beside_images(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = (data / "train.jsonl").read_text().replace("images/", f"{data}/images/")
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps({"messages": plain}) + "\n" + lines, encoding="utf-8")
    stage = {"train": "full", "batch": 11, "micro_batch": 1}
    recipe = make_recipe(stage, data={"train": str(path)})
    run(recipe)
    assert losses(recipe)[-1] < losses(recipe)[0]


def test_a_checkpoint_keeps_its_number_format(make_recipe: MakeRecipe, tiny_folder: Path) -> None:
    halved = make_recipe(save_dtype="bfloat16")
    model = run(halved)
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    again = make_recipe({"steps": 1}, model=str(model), output=f"{halved.output}-2")
    config = json.loads((run(again) / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_bad_examples_are_named_before_the_first_step(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    good = (data / "train.jsonl").read_text().replace("images/", f"{data}/images/")
    path.write_text(good + '{"file_name": "no.png", "text": "x"}\n')
    recipe = make_recipe(data={"train": str(path)})
    with pytest.raises(DataError, match=r"bad\.jsonl, example 11: .*no\.png"):
        run(recipe)
    assert not (Path(recipe.output) / "metrics.jsonl").exists()


def test_a_pattern_that_names_no_layer_is_told_the_layers(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"train": "lora", "lora": {"modules": ["q_proj"]}})
    with pytest.raises(ConfigError, match=r"'q_proj'.*decoder\.layers\.\*\.attention\.query"):
        run(recipe)


def test_a_later_stage_is_checked_before_the_first_begins(make_recipe: MakeRecipe) -> None:
    first = {"train": "connector", "steps": 1}
    recipe = make_recipe(stages=[first, {"train": "lora", "steps": 1, "lora": {"modules": ["x"]}}])
    with pytest.raises(ConfigError, match="'x', which matches no linear layer"):
        run(recipe)
    assert not Path(recipe.output).exists()


def test_what_an_extra_lacks_is_said_before_the_first_step(
    make_recipe: MakeRecipe, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    evaluated = make_recipe(data={"evaluation": str(data / "images")}, evaluation={"answers": 2})
    with pytest.raises(ConfigError, match="the package jiwer"):
        run(evaluated)
    with pytest.raises(ConfigError, match="the package peft"):
        run(make_recipe({"train": "lora"}))
    assert not Path(evaluated.output).exists()


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("decoder.layers.*.attention", 8),
        ("decoder.layers.*.attention.query", 2),
        ("vision.layers.1", 6),
        ("*", 27),
    ],
)
def test_adapters_go_where_the_pattern_says(tiny_folder: Path, pattern: str, layers: int) -> None:
    model = smolstack.load(tiny_folder).model
    assert len(adapted_layers(model, Lora(modules=(pattern,)))) == layers


def test_an_earlier_run_is_not_overwritten_unasked(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"steps": 1})
    run(recipe)
    with pytest.raises(TrainingError, match="contains an earlier run"):
        run(recipe)
    run(recipe, overwrite=True)
    with pytest.raises(TrainingError, match=r"stages\[0\].learning_rate .*0.5.* 0.001"):
        run(make_recipe({"steps": 1, "learning_rate": 0.5}), resume=True)


def test_two_runs_at_once_on_one_output_are_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"steps": 1})
    with (
        exclusive_writer(Path(recipe.output), TrainingError),
        pytest.raises(TrainingError, match="another process is writing"),
    ):
        run(recipe)
    run(recipe)


@pytest.mark.parametrize("connector", [False, True])
def test_transformers_gives_the_fine_tunes_answers(
    make_recipe: MakeRecipe, tiny_folder: Path, data: Path, connector: bool
) -> None:
    """Merged into a folder, and as adapters that peft puts on transformers' own model."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    lora = {"modules": ["decoder", "vision.layers.*"], "rank": 4, "connector": connector}
    recipe = make_recipe({"train": "lora", "lora": lora, "steps": 8, "learning_rate": 1e-2})
    merged = run(recipe)
    path_of_image = data / "images" / "3.png"
    vlm = smolstack.load(merged)
    answer = vlm.ask(path_of_image, "What does it say?", split=False, max_new_tokens=12)
    untrained = smolstack.load(tiny_folder).ask(
        path_of_image, "What does it say?", split=False, max_new_tokens=12
    )
    assert answer.token_ids != untrained.token_ids

    processor = transformers.AutoProcessor.from_pretrained(merged)
    content = [{"type": "image"}, {"type": "text", "text": "What does it say?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    with Image.open(path_of_image) as image:
        inputs = processor(
            text=prompt, images=[image], return_tensors="pt", do_image_splitting=False
        )

    def answered(model: Any) -> tuple[int, ...]:
        with torch.no_grad():
            out = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())

    load = transformers.AutoModelForImageTextToText.from_pretrained
    assert answered(load(merged)) == answer.token_ids
    adapter = Path(recipe.output) / "adapter"
    assert answered(peft.PeftModel.from_pretrained(load(tiny_folder), adapter)) == answer.token_ids
    ours = smolstack.load(adapter)
    again = ours.ask(path_of_image, "What does it say?", split=False, max_new_tokens=12)
    assert again.token_ids == answer.token_ids


def test_adapters_count_in_answers_that_the_kernels_had_begun_to_give() -> None:
    """Also where the decoder was laid out for them before, and again once they are merged."""
    model = smolstack.load(dtype="float32").model
    ids = torch.tensor([[256, *b"Read the line"]])

    def one_token() -> torch.Tensor:
        with torch.inference_mode():
            cache = KVCache(model.config.text, 1, ids.shape[1])
            model.prefill_embeddings(model.decoder.embedding(ids[:, :-1]), cache)
            return model.decode_one_token(ids[:, -1], cache)[0]

    def whole() -> torch.Tensor:
        with torch.inference_mode():
            return model.logits(model.decoder(model.decoder.embedding(ids)))[0, -1]

    before = one_token()
    torch.testing.assert_close(before, whole(), atol=1e-3, rtol=1e-3)
    adapters = add_adapters(model, Lora(modules=("decoder.layers.*.attention",), rank=4), seed=0)
    for layer in adapters.layers:
        adapted: Any = model.get_submodule(layer)
        torch.nn.init.normal_(adapted.lora_B["default"].weight, std=0.1)
    assert float((whole() - before).abs().max()) > 0.1
    for _ in range(2):
        torch.testing.assert_close(one_token(), whole(), atol=1e-3, rtol=1e-3)
    adapters.merge()
    torch.testing.assert_close(one_token(), whole(), atol=1e-3, rtol=1e-3)
