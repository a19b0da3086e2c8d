"""Fixtures that every room's tests share: a small checkpoint of the family's form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.family import Preset, SpecialTokens
from smolstack.processor.settings import ImageSettings

# A shared machine makes single examples slow now and then; that is no failure.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Test workers share the machine: one thread each."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_preset() -> Preset:
    """A whole model of the family in miniature: 32-pixel tiles, 4×4 patches, scale 2."""
    tokens = SpecialTokens(
        ids={
            "<|endoftext|>": 0,
            "<|im_start|>": 1,
            "<|im_end|>": 2,
            "<fake_token_around_image>": 860,
            "<image>": 861,
            "<global-img>": 862,
            **{f"<row_{r}_col_{c}>": 857 + 6 * r + c for r in range(1, 7) for c in range(1, 7)},
            "<end_of_utterance>": 900,
        },
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
    )
    text = TextConfig(
        rope=RopeConfig(theta=10000.0),
        vocab_size=904,
        hidden_size=48,
        intermediate_size=64,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_positions=512,
        bos_token_id=1,
        eos_token_ids=(900,),
        pad_token_id=2,
    )
    vision = VisionConfig(32, 64, 2, 4, image_size=32, patch_size=8)
    return Preset(
        "tiny",
        "nobody/tiny",
        ModelConfig(vision, text, scale=2, image_token_id=861),
        ImageSettings(longest_edge=128, tile_edge=32),
        tokens,
    )


@pytest.fixture(scope="session")
def tiny_folder(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny preset; tests must not write into it."""
    return new_checkpoint(tiny_preset, tmp_path_factory.mktemp("tiny") / "model", seed=3)


@pytest.fixture(scope="session")
def tied_folder(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with lm_head tied to the token embedding."""
    preset = replace(tiny_preset, config=replace(tiny_preset.config, tied=True))
    return new_checkpoint(preset, tmp_path_factory.mktemp("tied") / "model", seed=4)


@pytest.fixture(scope="session")
def retrieval_folder(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ending in a retrieval head, as ColSmol does."""
    preset = replace(tiny_preset, config=replace(tiny_preset.config, embedding_dim=16))
    return new_checkpoint(preset, tmp_path_factory.mktemp("retrieval") / "model", seed=4)


@pytest.fixture(scope="session")
def tiny_vlm(tiny_folder: Path) -> smolstack.VLM:
    return smolstack.load(tiny_folder)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Three images of different sizes and contents."""
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((40, 100), (90, 90), (120, 30))
    ]
