"""The planner: sizes in, tiles and tokens out, against figures that can be checked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolstack.errors import ImageError
from smolstack.family import PRESETS
from smolstack.processor.geometry import plan_tiles
from smolstack.processor.settings import ImageSettings

SMALL = ImageSettings(longest_edge=2048, tile_edge=512)
sizes = st.tuples(st.integers(1, 6000), st.integers(1, 6000))


@pytest.mark.parametrize(
    ("size", "resized", "canvas", "grid", "tiles", "tokens"),
    [
        ((1920, 1080), (2048, 1152), (2048, 1536), (3, 4), 13, 832),
        ((1080, 1920), (1152, 2048), (1536, 2048), (4, 3), 13, 832),
        ((512, 512), (2048, 2048), (2048, 2048), (4, 4), 17, 1088),  # a thumbnail grows too
        ((100, 10), (2048, 204), (2048, 512), (1, 4), 5, 320),
        ((10, 5000), (4, 2048), (512, 2048), (4, 1), 5, 320),
        ((1, 1), (2048, 2048), (2048, 2048), (4, 4), 17, 1088),
    ],
)
def test_published_sizes_at_512_pixel_tiles(
    size: tuple[int, int],
    resized: tuple[int, int],
    canvas: tuple[int, int],
    grid: tuple[int, int],
    tiles: int,
    tokens: int,
) -> None:
    plan = plan_tiles(size, SMALL, 64)
    assert (plan.resized, plan.canvas) == (resized, canvas)
    assert (plan.rows, plan.cols) == grid
    assert (plan.tiles, plan.visual_tokens) == (tiles, tokens)
    assert plan.pixels_read == tiles * 512 * 512


def test_without_splitting_every_image_is_one_tile() -> None:
    plan = plan_tiles((1920, 1080), SMALL, 64, split=False)
    assert (plan.rows, plan.cols, plan.tiles, plan.visual_tokens) == (0, 0, 1, 64)
    assert plan.canvas == (512, 512)


def test_an_image_that_fits_one_tile_is_not_split() -> None:
    settings = ImageSettings(longest_edge=512, tile_edge=512)
    plan = plan_tiles((300, 200), settings, 64)
    assert (plan.rows, plan.cols, plan.tiles) == (0, 0, 1)


def test_idefics3_cuts_364_pixel_tiles_of_169_tokens() -> None:
    preset = PRESETS["idefics3-8b"]
    plan = plan_tiles((1000, 1000), preset.settings, preset.config.tokens_per_tile)
    assert (plan.rows, plan.cols, plan.visual_tokens) == (4, 4, 17 * 169)


def test_boxes_name_the_tiles_row_by_row() -> None:
    plan = plan_tiles((200, 100), ImageSettings(longest_edge=64, tile_edge=32), 4)
    assert (plan.rows, plan.cols) == (1, 2)
    assert plan.boxes() == [(0, 0, 32, 32), (32, 0, 64, 32)]
    assert plan.source_boxes() == [(0, 0, 100, 100), (100, 0, 200, 100)]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="both sides must be positive"):
        plan_tiles(size, SMALL, 64)


@given(size=sizes, longest=st.integers(1, 5000), edge=st.integers(20, 700))
def test_tiles_cover_the_canvas_exactly(size: tuple[int, int], longest: int, edge: int) -> None:
    plan = plan_tiles(size, ImageSettings(longest, edge), 64)
    wide, high = plan.canvas
    assert wide % edge == high % edge == 0
    boxes = plan.boxes()
    assert len(boxes) + 1 == plan.tiles
    if boxes:
        assert sum((r - left) * (b - t) for left, t, r, b in boxes) == wide * high
        assert max(plan.rows, plan.cols) > 1
    else:
        assert plan.canvas == (edge, edge)


@pytest.mark.parametrize(
    ("budget", "grid", "tokens"),
    [
        (2000, (3, 4), 832),
        (832, (3, 4), 832),
        (831, (2, 3), 448),
        (400, (2, 2), 320),
        (64, (0, 0), 64),
    ],
)
def test_a_token_budget_takes_the_largest_grid_that_fits(
    budget: int, grid: tuple[int, int], tokens: int
) -> None:
    plan = plan_tiles((1920, 1080), SMALL, 64, max_image_tokens=budget)
    assert ((plan.rows, plan.cols), plan.visual_tokens) == (grid, tokens)


def test_a_budget_below_one_tile_is_refused() -> None:
    with pytest.raises(ImageError, match=r"max_image_tokens .*63.* 64"):
        plan_tiles((1920, 1080), SMALL, 64, max_image_tokens=63)


@given(size=sizes, budget=st.integers(64, 1500), upscale=st.booleans())
def test_a_budget_is_kept_and_never_makes_an_image_dearer(
    size: tuple[int, int], budget: int, upscale: bool
) -> None:
    free = plan_tiles(size, SMALL, 64, upscale=upscale)
    plan = plan_tiles(size, SMALL, 64, max_image_tokens=budget, upscale=upscale)
    assert plan.visual_tokens <= min(budget, free.visual_tokens)


@pytest.mark.parametrize(
    ("size", "grid"), [((300, 200), (0, 0)), ((600, 200), (1, 2)), ((1920, 1080), (3, 4))]
)
def test_small_images_may_stay_small(size: tuple[int, int], grid: tuple[int, int]) -> None:
    plan = plan_tiles(size, SMALL, 64, upscale=False)
    assert (plan.rows, plan.cols) == grid
    assert max(plan.resized) <= max(size)


@given(size=sizes)
def test_turning_an_image_turns_its_plan(size: tuple[int, int]) -> None:
    width, height = size
    if width == height:
        return
    plan, turned = plan_tiles(size, SMALL, 64), plan_tiles((height, width), SMALL, 64)
    # The ratio is rounded the other way round, which may move the short side by two pixels and
    # so, rarely, by a row of tiles.
    assert abs(plan.rows - turned.cols) <= 1
    assert plan.cols == turned.rows or abs(plan.cols - turned.rows) <= 1
