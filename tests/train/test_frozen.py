"""A frozen tower runs once per image, and nothing depends on whether it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.train.conftest import draw

import smolstack
from smolstack.processor.geometry import TilePlan
from smolstack.train import epoch_timing
from smolstack.train.frozen_tower import FrozenTower
from smolstack.vlm import VLM


@pytest.fixture
def vlm(tiny_folder: Path) -> VLM:
    return smolstack.load(tiny_folder)


def planned(vlm: VLM, *images: Image.Image) -> list[tuple[Image.Image, TilePlan]]:
    return [(image, vlm.processor.plan(image)) for image in images]


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def tower(
    vlm: VLM, cache: Path | None, *, projected: bool = False, precision: str = "float32"
) -> FrozenTower:
    return FrozenTower(
        vlm.model, vlm.processor, projected=projected, precision=precision, cache=cache
    )


def test_the_second_time_the_tower_does_not_run(vlm: VLM, tmp_path: Path) -> None:
    images = planned(vlm, draw("1", 1), draw("2", 2), draw("1", 1))
    first, again, none = (tower(vlm, cache) for cache in (tmp_path, tmp_path, None))
    states = first(images)
    assert (first.computed, first.read) == (2, 1)
    assert same(again(images), states)
    assert (again.computed, again.read) == (0, 3)
    assert same(none(images), states)


@pytest.mark.parametrize("projected", [False, True])
def test_visual_tokens_are_those_of_the_model(vlm: VLM, tmp_path: Path, projected: bool) -> None:
    image = draw("12", 3)
    (pair,) = planned(vlm, image)
    states = tower(vlm, tmp_path, projected=projected).states(*pair)
    visual = states if projected else vlm.model.connector.proj(states)
    torch.testing.assert_close(visual, vlm.encode(image).tokens, atol=1e-6, rtol=1e-6)


def test_other_weights_images_or_settings_are_other_entries(vlm: VLM, tmp_path: Path) -> None:
    one, other = planned(vlm, draw("1", 1), draw("1", 5))
    tower(vlm, tmp_path)([one])
    with torch.no_grad():
        vlm.model.connector.proj.weight.mul_(2)
    kept = tower(vlm, tmp_path)
    kept([one])
    assert kept.computed == 0, "the connector stands behind what is kept"
    kept([other, (one[0], vlm.processor.plan(one[0], split=False))])
    assert kept.computed == 2
    with torch.no_grad():
        vlm.model.vision.norm.bias[0] += 1e-3
    changed = tower(vlm, tmp_path)
    changed([one])
    assert changed.computed == 1


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_another_precision_is_near_and_leaves_the_model_alone(
    vlm: VLM, tmp_path: Path, precision: str, most: float
) -> None:
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    images = planned(vlm, draw("12", 3), draw("7", 4))
    exact = tower(vlm, tmp_path)(images)
    rounded = tower(vlm, tmp_path, precision=precision)
    states = rounded(images)
    assert rounded.computed == 2, "the entries of another precision are not its own"
    assert exact is not None
    assert states is not None
    assert states.dtype == torch.float32
    assert 0 < float((states - exact).norm() / exact.norm()) < most
    again = tower(vlm, tmp_path, precision=precision)
    assert same(again(images), states)
    assert again.computed == 0
    after = vlm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert vlm.model.scheme is None


def test_a_damaged_entry_is_made_again(vlm: VLM, tmp_path: Path) -> None:
    images = planned(vlm, draw("1", 1))
    states = tower(vlm, tmp_path)(images)
    (entry,) = tmp_path.rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:100])
    again = tower(vlm, tmp_path)
    assert same(again(images), states)
    assert again.computed == 1


def test_seconds_per_epoch_can_be_measured(tiny_folder: Path, capsys: Any) -> None:
    arguments = [str(tiny_folder), "--images", "3", "--batch", "2", "--rounds", "1"]
    epoch_timing.main([*arguments, "--no-split", "--train", "connector", "lora"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["stage", "connector", "lora"]
    assert all(line.count(" s") == 3 and line.endswith(" MiB") for line in printed[1:])
