"""Fixtures of the transformers tests: one small folder of each family, and prompts over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.family import Preset
from smolstack.vlm import VLM

FAMILIES = ("idefics3", "smolvlm")


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder, loaded by both sides on request."""

    path: Path
    model_type: str

    def vlm(self) -> VLM:
        return smolstack.load(self.path, dtype="float32")

    def theirs(self) -> Any:
        """transformers' own model."""
        transformers = pytest.importorskip("transformers")
        return transformers.AutoModelForImageTextToText.from_pretrained(
            self.path, dtype=torch.float32
        ).eval()

    def ours(self) -> Any:
        """The model that ``register`` makes of the same folder."""
        pytest.importorskip("transformers")
        from smolstack.interop import transformers as bridge

        name = "SmolVLM" if self.model_type == "smolvlm" else "Idefics3"
        model: Any = getattr(bridge, f"{name}ForConditionalGeneration")
        return model.from_pretrained(self.path, dtype=torch.float32).eval()


@pytest.fixture(scope="session", params=FAMILIES)
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_preset: Preset
) -> Folder:
    path = tmp_path_factory.mktemp("interop") / request.param
    preset = replace(
        tiny_preset, config=replace(tiny_preset.config, model_type=request.param, tied=True)
    )
    new_checkpoint(preset, path, seed=3)
    return Folder(path, request.param)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse coloured noise: tiles that differ."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


@pytest.fixture(scope="session")
def prompts(folder: Folder) -> dict[str, torch.Tensor]:
    """Three rows: a split image, two small ones, none at all; padded on the left."""
    pytest.importorskip("transformers")
    from smolstack.interop.reference import model_inputs

    processor = folder.vlm().processor
    batch = processor.batch(
        [
            processor.prepare((random_image(80, 40), "What does it say?"), split=True),
            processor.prepare(
                ([random_image(30, 30, 1), random_image(20, 40, 2)], "Compare."), split=False
            ),
            processor.prepare("There is nothing written here."),
        ]
    )
    return model_inputs(batch)
