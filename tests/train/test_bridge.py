"""One checkpoint's eyes and another's words become a checkpoint whose connector can be trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.conftest import MakeRecipe, draw

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.family import Preset
from smolstack.train import bridge_towers, train


@pytest.mark.parametrize("tied", [False, True])
def test_both_towers_are_kept_and_the_connector_fits_between_them(
    tiny_folder: Path, tiny_preset: Preset, make_recipe: MakeRecipe, tmp_path: Path, tied: bool
) -> None:
    """The text comes from a model of other widths, whose own images were cut otherwise."""
    config = tiny_preset.config
    other = replace(
        tiny_preset,
        config=replace(
            config,
            text=replace(config.text, hidden_size=40, num_heads=5, num_kv_heads=1),
            vision=replace(config.vision, hidden_size=24, patch_size=4, num_heads=2),
            scale=4,
            tied=tied,
        ),
    )
    text = new_checkpoint(other, tmp_path / "text", seed=9)
    bridged = bridge_towers(tiny_folder, text, tmp_path / "bridged", seed=1)
    eyes, words, both = map(smolstack.load, (tiny_folder, text, bridged))
    assert both.model.connector.proj.weight.shape == (40, 2 * 2 * config.vision.hidden_size)
    for name, weight in both.model.state_dict().items():
        if not name.startswith("connector."):
            source = eyes if name.startswith("vision.") else words
            assert torch.equal(weight, source.model.state_dict()[name]), name
    image = draw("7", 1)
    assert both.plan(image).tiles == eyes.plan(image).tiles
    visual = both.encode(image).tokens
    embeddings = both.model.decoder.embedding.weight.detach()
    assert 0.2 < float(visual.std() / embeddings.std()) < 5
    trained = train(make_recipe({"steps": 1}, model=str(bridged)), quiet=True)
    assert smolstack.load(trained.model).ask(image, "Hi", max_new_tokens=2).token_ids
    again = bridge_towers(tiny_folder, text, tmp_path / "again", seed=1)
    weights = (folder / "model.safetensors" for folder in (bridged, again))
    assert len({path.read_bytes() for path in weights}) == 1
