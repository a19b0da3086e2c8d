"""A bridged model lives like any other: command line, GGUF source, training, export, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from tests.bridging.conftest import MakeText, MakeVision
from tests.checkpoint.gguf_files import _write_text, write_gguf
from typer.testing import CliRunner

import smolstack
from smolstack.bridging import bridge_towers
from smolstack.cli.app import app
from smolstack.config import TextConfig
from smolstack.train import Recipe, train

IMAGE = Image.linear_gradient("L").resize((90, 60)).convert("RGB")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_from_the_command_line_to_verify_and_an_answer(
    make_vision: MakeVision,
    make_text: MakeText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out, shown = tmp_path / "bridged", tmp_path / "image.png"
    IMAGE.save(shown)
    result = run("bridge", make_vision(whole=True), make_text(), out, "--visual-tokens", 9)
    assert result.exit_code == 0, result.output
    assert "6×6 patches by scale 2: 9 visual tokens a tile; 96 → 48, untrained" in result.stdout
    assert "350 tokens, 20 of them new, 330 to 349" in result.stdout
    assert "left out logit_bias, logit_scale, the pooling head, the text tower" in result.stderr
    assert run("verify", out).exit_code == 0
    asked = run("ask", shown, "Which?", "--model", out, "--max-new-tokens", 2)
    assert asked.exit_code == 0, asked.output
    again = run("bridge", make_vision(), make_text(), out)
    assert again.exit_code == 2
    assert "exists and is not empty" in again.stderr


def test_the_reader_is_named_by_a_word(make_text: MakeText, tmp_path: Path) -> None:
    result = run("bridge", "reader", make_text(), tmp_path / "bridged", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    vlm = smolstack.load(tmp_path / "bridged", device="cpu", dtype="float32")
    assert vlm.config.vision == smolstack.load().config.vision
    config = json.loads((tmp_path / "bridged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_gguf_file_is_the_folder_that_it_was_made_of(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path
) -> None:
    text, vision = make_text(pad_token_id=0), make_vision()
    config = TextConfig.from_hf(json.loads((text / "config.json").read_text())).to_hf()
    file, weights = tmp_path / "text.gguf", load_file(text / "model.safetensors")
    _write_text(text, file, {"text_config": config}, weights, "F32", "gpt-2")
    answers = [
        smolstack.load(bridge_towers(vision, source, tmp_path / name), device="cpu").ask(
            None, "How are you today?", max_new_tokens=16
        )
        for name, source in (("one", text), ("two", file))
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_a_familys_gguf_file_keeps_its_image_tokens(
    make_vision: MakeVision, tied_folder: Path, tmp_path: Path
) -> None:
    """The language model of a published GGUF pair, without its own vision tower."""
    text, _ = write_gguf(tied_folder, tmp_path / "gguf")
    bridged = bridge_towers(make_vision(), text, tmp_path / "bridged")
    vlm = smolstack.load(bridged, device="cpu")
    assert vlm.config.text.vocab_size == 904
    assert vlm.config.image_token_id == 861
    answer = vlm.ask(IMAGE, "Which?", max_new_tokens=2, split=False)
    assert answer.usage.visual_tokens == 36


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_it_trains_and_computes_in_every_precision(
    make_vision: MakeVision, make_text: MakeText, tmp_path: Path, dtype: str
) -> None:
    """With a vocabulary that no kernel's block divides."""
    bridged = bridge_towers(make_vision(), make_text(), tmp_path / "bridged")
    (tmp_path / "data").mkdir()
    IMAGE.save(tmp_path / "data" / "1.png")
    (tmp_path / "data" / "1.txt").write_text("forty-two")
    stage = {"train": "connector", "steps": 2, "batch": 1, "micro_batch": 1, "warmup": 0}
    recipe = Recipe.from_dict(
        {
            "model": str(bridged),
            "output": str(tmp_path / "run"),
            "data": {"train": str(tmp_path / "data"), "split": False},
            "evaluation": {"answers": 0},
            "stages": [{**stage, "learning_rate": 1e-3}],
        }
    )
    trained = train(recipe, quiet=True)
    vlm = smolstack.load(trained.model, dtype=dtype, device="cpu")
    assert vlm.ask(IMAGE, "Which?", max_new_tokens=3).usage.completion_tokens >= 1


def test_it_is_exported(make_vision: MakeVision, make_text: MakeText, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    bridged = bridge_towers(make_vision(), make_text(), tmp_path / "bridged")
    result = run("export", bridged, tmp_path / "exported")
    assert result.exit_code == 0, result.output
