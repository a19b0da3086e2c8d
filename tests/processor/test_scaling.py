"""Images are scaled to Pillow's numbers, whichever way they are scaled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolstack.native import library as native
from smolstack.processor import scaling

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


def by_pillow(planes: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    return np.asarray(image.resize(size, Image.Resampling(resample))).transpose(2, 0, 1)


@settings(max_examples=150, deadline=None)
@given(before=SIZES, after=SIZES, resample=st.sampled_from([0, 1, 2, 3, 4, 5]), sharp=st.booleans())
def test_every_pixel_is_pillows(
    before: tuple[int, int], after: tuple[int, int], resample: int, sharp: bool
) -> None:
    noise = np.random.default_rng(before[0] * 300 + after[1])
    planes = noise.integers(0, 256, (3, before[1], before[0]), dtype=np.uint8)
    if sharp:  # black and white: the filters overshoot
        planes = np.where(planes < 128, 0, 255).astype(np.uint8)
    found = scaling.resize(planes, after, resample)
    assert np.array_equal(found, by_pillow(planes, after, resample))


def test_without_kernels_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (3, 90, 40), dtype=np.uint8)
    expected = scaling.resize(planes, (70, 33), 1)
    scaling._order.cache_clear()
    monkeypatch.setattr(native, "library", lambda: None)
    try:
        assert np.array_equal(scaling.resize(planes, (70, 33), 1), expected)
    finally:
        scaling._order.cache_clear()


def test_a_pillow_with_other_numbers_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scaling, "_by_pillow", lambda planes, size, _: np.zeros((3, size[1], size[0]), np.uint8)
    )
    scaling._order.cache_clear()
    try:
        planes = np.full((3, 9, 9), 7, dtype=np.uint8)
        assert not scaling.resize(planes, (20, 20), 1).any()
    finally:
        scaling._order.cache_clear()
