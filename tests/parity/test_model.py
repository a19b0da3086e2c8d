"""On the same weights, smolstack computes what transformers computes, at every stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smolstack.batch import Batch
from smolstack.checkpoint.new import random_model, side_files
from smolstack.checkpoint.save import save_checkpoint
from smolstack.config import ModelConfig, RopeConfig
from smolstack.family import PRESETS, Preset
from smolstack.interop.miniature import miniature
from smolstack.interop.reference import load_model, share_model
from smolstack.interop.traces import (
    Trace,
    difference,
    output_difference,
    spread,
    trace_ours,
    trace_theirs,
)
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import TextTokenizer

BOUND = 1e-4
TEXT_MODELS = [name for name, preset in PRESETS.items() if preset.config.embedding_dim is None]
RETRIEVAL_MODELS = [name for name in PRESETS if name not in TEXT_MODELS]


def _processor(preset: Preset) -> Processor:
    files = side_files(preset, preset.config)
    tokenizer = TextTokenizer(files["tokenizer.json"], {})
    template = files["chat_template.jinja"].decode()
    return Processor(preset.config, preset.settings, tokenizer, template)


def _image(width: int, height: int, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def _batch(preset: Preset) -> Batch:
    """One split image, two unsplit ones, and no image: three lengths, padded on the left."""
    processor = _processor(preset)
    pair = [_image(60, 90, 1), _image(80, 20, 2)]
    return processor.batch(
        [
            processor.prepare((_image(640, 160), "What does it say?"), split=True),
            processor.prepare((pair, "Compare the two images."), split=False),
            processor.prepare("There is nothing written here."),
        ]
    )


def _assert_same(ours: Trace, theirs: Trace, batch: Batch, *, unit: bool = False) -> None:
    real = batch.attention_mask
    assert spread(ours, real) > 0.1, "outputs are nearly flat: agreement would prove little"
    assert difference(ours.positions, theirs.positions) == 0
    assert difference(ours.tower, theirs.tower) <= BOUND
    assert difference(ours.connector, theirs.connector) <= BOUND
    assert difference(ours.merged[real], theirs.merged[real]) <= BOUND
    assert output_difference(ours, theirs, real, unit=unit) <= BOUND


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_published_shape_saved_by_smolstack_gives_the_same_logits_in_transformers(
    name: str, tmp_path: Path
) -> None:
    preset = miniature(PRESETS[name])
    model = random_model(preset.config, seed=1)
    theirs = load_model(save_checkpoint(tmp_path / "model", model, {}))
    batch = _batch(preset)
    _assert_same(trace_ours(model, batch), trace_theirs(theirs, batch), batch)


@pytest.mark.parametrize("name", RETRIEVAL_MODELS)
def test_a_retrieval_model_gives_the_same_embeddings(name: str) -> None:
    preset = miniature(PRESETS[name])
    model = random_model(preset.config, seed=2)
    theirs = share_model(model)
    batch = _batch(preset)
    _assert_same(trace_ours(model, batch), trace_theirs(theirs, batch), batch, unit=True)
    with torch.inference_mode():
        ours = model.embed(batch)
        length = ours.norm(dim=-1)
    assert torch.allclose(length, batch.attention_mask.float(), atol=1e-6)


SMALL = replace(
    miniature(PRESETS["smolvlm-256m"]), settings=ImageSettings(longest_edge=128, tile_edge=32)
)
SMALL = replace(
    SMALL,
    config=replace(
        SMALL.config,
        scale=2,
        vision=replace(SMALL.config.vision, image_size=32, patch_size=8),
        text=replace(SMALL.config.text, max_positions=512),
    ),
)


def _text(**changes: object) -> ModelConfig:
    return replace(SMALL.config, text=replace(SMALL.config.text, **changes))  # type: ignore[arg-type]


VARIANTS: dict[str, ModelConfig] = {
    "tied": replace(SMALL.config, tied=True),
    "nine query heads on three": _text(hidden_size=72, num_heads=9, num_kv_heads=3, head_dim=8),
    "fifteen query heads on five": _text(hidden_size=120, num_heads=15, num_kv_heads=5, head_dim=8),
    "thirty-two query heads on eight": _text(
        hidden_size=128, num_heads=32, num_kv_heads=8, head_dim=4
    ),
    "one key head for all": _text(num_kv_heads=1),
    "a head size of its own": _text(hidden_size=72, num_heads=6, num_kv_heads=2, head_dim=32),
    "biases in attention": _text(attention_bias=True),
    "biases in the mlp": _text(mlp_bias=True),
    "gelu in the decoder": _text(hidden_act="gelu"),
    "a large epsilon": _text(rms_norm_eps=1e-2),
    "linear rope": _text(rope=RopeConfig(theta=10000.0, type="linear", factor=4.0)),
    "llama3 rope": _text(
        head_dim=64,
        rope=RopeConfig(
            theta=500000.0,
            type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=64,
        ),
    ),
    "gelu in the tower": replace(
        SMALL.config, vision=replace(SMALL.config.vision, hidden_act="gelu")
    ),
    "relu in the tower": replace(
        SMALL.config, vision=replace(SMALL.config.vision, hidden_act="relu")
    ),
    "scale one": replace(SMALL.config, scale=1),
    "scale four": replace(SMALL.config, scale=4),
    "pixels left over": replace(
        SMALL.config, vision=replace(SMALL.config.vision, image_size=32, patch_size=5), scale=3
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_every_setting_of_a_config_means_the_same(
    variant: str, model_type: str, tmp_path: Path
) -> None:
    config = replace(VARIANTS[variant], model_type=model_type)
    preset = replace(SMALL, config=config)
    model = random_model(config, seed=3)
    theirs = load_model(save_checkpoint(tmp_path / "model", model, {}))
    batch = _batch(preset)
    _assert_same(trace_ours(model, batch), trace_theirs(theirs, batch), batch)


def test_llama3_rope_agrees_far_beyond_the_original_context() -> None:
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, original_max_positions=256)
    config = _text(rope=rope, head_dim=64, max_positions=4096)
    model = random_model(config, seed=4)
    ids = torch.randint(0, 800, (1, 2000), generator=torch.Generator().manual_seed(0))
    batch = _text_batch(ids)
    _assert_same(trace_ours(model, batch), trace_theirs(share_model(model), batch), batch)


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (8, 32), (16, 16), (32, 32)])
def test_tiles_that_are_smaller_or_oblong_pass_the_tower_alike(size: tuple[int, int]) -> None:
    model = random_model(SMALL.config, seed=5)
    tiles = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = share_model(model).model.vision_model(tiles).last_hidden_state
        assert difference(model.vision(tiles), theirs) <= BOUND


@pytest.mark.parametrize("seed", range(6))
def test_many_seeds_of_one_small_model(seed: int) -> None:
    model = random_model(SMALL.config, seed=100 + seed)
    batch = _batch(SMALL)
    _assert_same(trace_ours(model, batch), trace_theirs(share_model(model), batch), batch)


def test_text_alone_needs_no_images() -> None:
    model = random_model(SMALL.config, seed=6)
    batch = _text_batch(torch.arange(20)[None])
    ours, theirs = trace_ours(model, batch), trace_theirs(share_model(model), batch)
    assert ours.tower is None
    assert theirs.tower is None
    _assert_same(ours, theirs, batch)


def test_reading_token_by_token_gives_the_logits_of_reading_at_once() -> None:
    model: VisionLanguageModel = random_model(SMALL.config, seed=7)
    ids = torch.randint(0, 800, (2, 24), generator=torch.Generator().manual_seed(2))
    batch = _text_batch(ids[:, :16])
    with torch.inference_mode():
        theirs = share_model(model)(input_ids=ids).logits
        cache = model.new_cache(batch, 24)
        steps = [model.prefill(batch, cache)]
        steps += [model.decode_one_token(ids[:, place], cache) for place in range(16, 24)]
    assert difference(torch.stack(steps, dim=1), theirs[:, 15:]) <= BOUND


def _text_batch(ids: torch.Tensor) -> Batch:
    return Batch(
        token_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        tiles=torch.empty(0, 3, 32, 32),
        images_per_sequence=(0,) * len(ids),
    )
