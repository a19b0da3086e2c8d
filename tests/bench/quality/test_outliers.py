"""Outliers change no answer in float32, and are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import smolstack
from smolstack.bench.quality.outliers import outlier_folder, plant_outliers
from smolstack.checkpoint.new import new_checkpoint
from smolstack.errors import ConfigError
from smolstack.family import Preset


def outputs(vlm: smolstack.VLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual tokens of noise, and logits of a text."""
    size = vlm.config.vision.image_size
    tiles = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = vlm.model(vlm.processor(["What does it say? The answer is 42."]))
        return vlm.model.encode_tiles(tiles), logits


@pytest.mark.parametrize("kind", ["tiny_folder", "tied_folder"])
def test_the_same_function_with_outliers(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(kind)
    out = outlier_folder(folder, tmp_path / "out")
    expected, found = (outputs(smolstack.load(path, dtype="float32")) for path in (folder, out))
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max()) < 1e-4 * float(one.abs().max())
    before, after = (smolstack.load(path, dtype="float32").model for path in (folder, out))
    changed = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        if not name.endswith("norm.weight"):
            continue
        # 1 % of so few channels is one, which is 20 to 60 times what it was; the others are kept.
        ratio = (changed[name] / weight).detach()
        outliers = ratio[(ratio - 1).abs() > 1e-6]
        assert len(outliers) == 1, name
        assert 20 <= float(outliers) <= 60, name


def test_values_have_outliers_under_grouped_attention_and_with_biases(
    tiny_preset: Preset, tmp_path: Path
) -> None:
    text = replace(tiny_preset.config.text, attention_bias=True)
    preset = replace(tiny_preset, config=replace(tiny_preset.config, text=text))
    folder = new_checkpoint(preset, tmp_path / "model")
    vlm = smolstack.load(folder, dtype="float32")
    expected = outputs(vlm)
    layers: Any = vlm.model.decoder.layers
    biases = [layer.attention.value.bias.clone() for layer in layers]
    assert plant_outliers(vlm, towers=("text",)) is vlm
    for one, other in zip(expected, outputs(vlm), strict=True):
        assert float((one - other).abs().max()) < 1e-4 * float(one.abs().max())
    for layer, bias in zip(layers, biases, strict=True):
        # The norm before it changes columns of the values' weight too; its bias tells the row.
        grown = layer.attention.value.bias / bias
        assert int((grown > 19).sum()) == 1


def test_the_vision_tower_alone_can_be_changed(tiny_folder: Path) -> None:
    vlm = plant_outliers(smolstack.load(tiny_folder, dtype="float32"), towers=("vision",))
    untouched = smolstack.load(tiny_folder, dtype="float32")
    assert torch.equal(vlm.model.decoder.norm.weight, untouched.model.decoder.norm.weight)
    assert not torch.equal(vlm.model.vision.norm.weight, untouched.model.vision.norm.weight)
    again = plant_outliers(smolstack.load(tiny_folder, dtype="float32"), towers=("vision",))
    assert torch.equal(vlm.model.vision.norm.weight, again.model.vision.norm.weight)


def test_only_float32_takes_outliers(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"int8.*float32"):
        plant_outliers(smolstack.load(tiny_folder, dtype="int8"))
    with pytest.raises(ConfigError, match="tower is 'audio', expected some of"):
        plant_outliers(smolstack.load(tiny_folder, dtype="float32"), towers=("audio",))
