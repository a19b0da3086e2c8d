"""Partly filled tiles get the positions and states that transformers gives them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smolstack.checkpoint.new import random_model
from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.interop.reference import pixel_mask, share_model
from smolstack.interop.rounding import bucketed, rounded_differently
from smolstack.model.vision import position_ids

PUBLISHED_SIDES = (26, 27, 32)


def _config(side: int, patch: int) -> ModelConfig:
    vision = VisionConfig(32, 48, 2, 4, image_size=side * patch, patch_size=patch)
    text = TextConfig(RopeConfig(1e4), 64, 32, 48, 1, 4, 2, 8)
    return ModelConfig(vision, text, scale=1, image_token_id=3)


def _both(config: ModelConfig, grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """States of the filled patches, ours and theirs, and their visual tokens' difference."""
    size, patch = config.vision.image_size, config.vision.patch_size
    model = random_model(config, seed=9)
    mask = pixel_mask(grids, size, patch)
    noise = torch.randn(len(grids), 3, size, size, generator=torch.Generator().manual_seed(3))
    tiles = noise * mask[:, None]
    cells = mask[:, ::patch, ::patch].flatten(1)
    with torch.inference_mode():
        ours = model.vision(tiles, grids)
        theirs = share_model(model).model.vision_model(
            tiles, patch_attention_mask=mask[:, ::patch, ::patch].contiguous()
        )
    return ours[cells], theirs.last_hidden_state[cells], cells


@pytest.mark.parametrize("side", PUBLISHED_SIDES)
def test_positions_of_every_filling_agree_on_the_published_grids(side: int) -> None:
    assert rounded_differently(side) == []
    for count in range(1, side + 1):
        assert position_ids(count, 1, side).tolist() == [i * side for i in bucketed(side, count)]
        assert position_ids(1, count, side).tolist() == bucketed(side, count)


@pytest.mark.parametrize("side", [2, 3, 4, 7, 8, 13, 16, 18])
def test_positions_agree_on_all_small_grids(side: int) -> None:
    assert rounded_differently(side) == []


def test_states_of_partly_filled_tiles_agree() -> None:
    grids = [(8, 8), (8, 3), (1, 8), (5, 7), (1, 1), (2, 6)]
    ours, theirs, cells = _both(_config(side=8, patch=4), grids)
    assert [int(count) for count in cells.sum(dim=1)] == [rows * cols for rows, cols in grids]
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("side", PUBLISHED_SIDES)
def test_states_agree_on_the_published_grids(side: int) -> None:
    ours, theirs, _ = _both(_config(side, patch=2), [(side, side), (side, side // 3), (5, side)])
    assert (ours - theirs).abs().max() <= 1e-4


def test_visual_tokens_of_partly_filled_tiles_agree_where_no_padding_enters() -> None:
    config = _config(side=8, patch=4)
    model = random_model(config, seed=10)
    grids = [(8, 4), (3, 8), (8, 8)]
    mask = pixel_mask(grids, 32, 4)
    tiles = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * mask[:, None]
    with torch.inference_mode():
        ours = model.encode_tiles(tiles, grids)
        theirs = share_model(model).model.get_image_features(tiles[None], mask[None])
    seen = mask[:, ::4, ::4].flatten()
    assert (ours.flatten(0, 1) - theirs.pooler_output[0])[seen].abs().max() <= 1e-4


def test_a_full_tile_keeps_its_order_where_transformers_rounds_it_away() -> None:
    # Documented in docs/parity.md: on a grid of 19 transformers gives patches 11 and 12 one id.
    assert rounded_differently(19) == [(19, [(12, 12, 11)])]
    assert position_ids(1, 19, 19).tolist() == list(range(19))
    assert len(set(bucketed(19, 19))) == 18


@pytest.mark.parametrize("side", [19, 27, 32])
def test_the_formula_compared_with_is_the_one_that_transformers_runs(side: int) -> None:
    config = _config(side, patch=1)
    embeddings = share_model(random_model(config)).model.vision_model.embeddings
    seen: list[Tensor] = []
    embeddings.position_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        full = torch.ones(1, side, side, dtype=torch.bool)
        embeddings(torch.zeros(1, 3, side, side), patch_attention_mask=full)
    ids = seen[0].view(side, side)
    assert ids[0].tolist() == bucketed(side, side)
    assert (ids[:, 0] // side).tolist() == bucketed(side, side)
