"""The planner promises the tiles that transformers then makes: thousands of sizes, no pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_backends import PilBackend

from smolstack.family import PRESETS
from smolstack.interop.reference import image_processor
from smolstack.processor.geometry import plan_tiles
from smolstack.processor.settings import ImageSettings

SETTINGS = sorted(
    {(preset.settings.longest_edge, preset.settings.tile_edge) for preset in PRESETS.values()}
    | {(512, 512), (1000, 300), (128, 32), (4096, 512), (6000, 700), (7, 32), (2048, 384)}
)


def _blank(width: int, height: int) -> Any:
    """An image of any size that takes no memory."""
    return np.broadcast_to(np.uint8(0), (3, height, width))


def _resized(_self: object, image: Any, size: Any, **_options: Any) -> Any:
    return _blank(size.width, size.height)


@pytest.fixture(scope="module", autouse=True)
def _no_pixels() -> Iterator[None]:
    """transformers' sizes are its own; only the resampling of pixels is left out."""
    with mock.patch.object(PilBackend, "resize", _resized):
        yield


def _theirs(size: tuple[int, int], chosen: ImageSettings) -> tuple[int, int, int, int]:
    """(rows, columns, tiles, most pixels of a tile's side) as transformers splits."""
    processor = image_processor(chosen)
    image = _blank(*size)
    if chosen.resize:
        image = processor.resize(image, processor.size, resample=1)
    edge = {"longest_edge": chosen.tile_edge}
    image = processor.resize_for_vision_encoder(image, chosen.tile_edge, resample=1)
    frames, rows, cols = processor.split_images(image, edge, resample=1)
    sides = {side for frame in frames for side in frame.shape[1:]}
    assert sides == {chosen.tile_edge}
    return rows, cols, len(frames), max(sides)


def _assert_same_plan(size: tuple[int, int], chosen: ImageSettings) -> None:
    plan = plan_tiles(size, chosen, 64)
    try:
        expected = _theirs(size, chosen)
    except ValueError:  # less than a pixel is left of the shorter side: only transformers refuses
        assert min(plan.resized) == 1
        return
    assert (plan.rows, plan.cols, plan.tiles, plan.tile_edge) == expected, (size, chosen)


@pytest.mark.parametrize(("longest", "tile"), SETTINGS)
def test_random_sizes(longest: int, tile: int) -> None:
    random = np.random.default_rng(longest + tile)
    chosen = ImageSettings(longest_edge=longest, tile_edge=tile)
    for width, height in random.integers(1, 5000, (250, 2)):
        _assert_same_plan((int(width), int(height)), chosen)


@pytest.mark.parametrize(("longest", "tile"), SETTINGS)
def test_sizes_whose_aspect_ratio_is_near_a_whole_number_of_tiles(longest: int, tile: int) -> None:
    chosen = ImageSettings(longest_edge=longest, tile_edge=tile)
    for rows in range(1, 9):
        for cols in range(1, 9):
            for off in (-1, 0, 1):
                _assert_same_plan((cols * 60 + off, rows * 60), chosen)


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20000), st.integers(1, 20000)),
    longest=st.integers(1, 6000),
    tile=st.integers(8, 800),
    resize=st.booleans(),
)
def test_any_size_and_any_settings(
    size: tuple[int, int], longest: int, tile: int, resize: bool
) -> None:
    _assert_same_plan(size, ImageSettings(longest_edge=longest, tile_edge=tile, resize=resize))
