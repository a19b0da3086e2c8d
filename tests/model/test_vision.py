"""The vision tower: full tiles, partly filled ones, and positions in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import smolstack
from smolstack.config import VisionConfig
from smolstack.errors import ConfigError, GridError
from smolstack.model.tile_passes import distinct_tiles
from smolstack.model.vision import VisionTower, position_ids

CONFIG = VisionConfig(16, 32, 2, 2, image_size=28, patch_size=8)  # 3x3 patches, 4 pixels unseen


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    torch.manual_seed(1)
    return VisionTower(CONFIG).eval()


def test_a_full_tile_has_the_identity_as_positions() -> None:
    assert position_ids(4, 4, 4).tolist() == list(range(16))


def test_a_smaller_grid_is_spread_over_the_table() -> None:
    # Two rows over a table of four: rows 0 and 2; three columns: columns 0, 1 and 2.
    assert position_ids(2, 3, 4).tolist() == [0, 1, 2, 8, 9, 10]


@given(side=st.integers(1, 64), part=st.integers(1, 64))
def test_positions_are_floor_of_i_side_over_n(side: int, part: int) -> None:
    n = min(side, part)
    expected = [i * side // n for i in range(n)]
    assert position_ids(n, 1, side).tolist() == [row * side for row in expected]
    assert position_ids(1, n, side).tolist() == expected


def test_pixels_past_the_last_whole_patch_are_never_seen(tower: VisionTower) -> None:
    tiles = torch.randn(1, 3, 28, 28)
    changed = tiles.clone()
    changed[..., 24:, :] = 99
    changed[..., :, 24:] = -99
    assert torch.equal(tower(tiles), tower(changed))
    assert tower(tiles).shape == (1, 9, 16)


def test_patches_are_the_strided_convolution(tower: VisionTower) -> None:
    tiles = torch.randn(2, 3, 28, 28)
    expected = tower.patch_embedding(tiles).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower.patches(tiles), expected, atol=1e-6, rtol=1e-5)


def test_a_tile_said_to_be_full_is_a_full_tile(tower: VisionTower) -> None:
    tiles = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(tower(tiles, [(3, 3), (3, 3)]), tower(tiles), atol=1e-6, rtol=1e-5)


def test_padding_patches_change_nothing_in_the_image(tower: VisionTower) -> None:
    tiles = torch.randn(1, 3, 28, 28)
    other = tiles.clone()
    other[..., 16:, :] = 7  # the third row of patches is padding
    first, second = tower(tiles, [(2, 3)])[:, :6], tower(other, [(2, 3)])[:, :6]
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_a_smaller_tile_is_the_image_part_of_a_padded_one(tower: VisionTower) -> None:
    small = torch.randn(1, 3, 16, 24)
    padded = torch.zeros(1, 3, 28, 28)
    padded[..., :16, :24] = small
    torch.testing.assert_close(tower(small), tower(padded, [(2, 3)])[:, :6], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "filled", "words"),
    [
        ((1, 1, 28, 28), None, r"expected \(N, 3, P, P\)"),
        ((1, 3, 28, 64), None, "a 3x8 patch grid; the tower's table holds 3x3"),
        ((1, 3, 4, 28), None, "a 0x3 patch grid"),
        ((2, 3, 28, 28), [(3, 3)], "1 filled grids for 2 tiles"),
        ((1, 3, 28, 28), [(4, 1)], "tile 0 is filled by 4x1 patches, its grid is 3x3"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(
    tower: VisionTower,
    shape: tuple[int, ...],
    filled: list[tuple[int, int]] | None,
    words: str,
) -> None:
    with pytest.raises(GridError, match=words):
        tower(torch.zeros(shape), filled)


def test_the_full_tile_path_compiles_into_one_graph(tower: VisionTower) -> None:
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    tiles = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(compiled(tiles), tower(tiles), atol=1e-5, rtol=1e-4)


def test_equal_tiles_are_found_and_only_those() -> None:
    white = torch.ones(3, 4, 4)
    other = white.clone()
    other[0, 0, 0], other[0, 0, 1] = 2, 0  # the same sum, another image
    tiles = torch.stack([white, other, white, torch.zeros(3, 4, 4), other])
    assert distinct_tiles(tiles) == ([0, 1, 3], [0, 1, 0, 2, 1])
    filled = [(1, 1), (1, 1), (2, 1), (1, 1), (1, 1)]
    assert distinct_tiles(tiles, filled) == ([0, 1, 2, 3], [0, 1, 2, 3, 1])
    assert distinct_tiles(tiles[:0]) == ([], [])


def test_a_compiled_tower_is_compiled_once_whatever_the_images_sizes(tiny_folder: Path) -> None:
    vlm = smolstack.load(tiny_folder)
    noise = np.random.default_rng(0)
    sizes = ((40, 30), (60, 20), (25, 70), (64, 64), (90, 15))
    images = [noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    expected = [vlm.encode(image).tokens for image in images]
    vlm.clear_caches()
    graphs: list[object] = []

    def backend(graph: Any, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    vlm.model.compile_tower(backend)
    found = [vlm.encode(image).tokens for image in images]
    found.append(vlm.encode(images[0], split=False).tokens)
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one, other)
    assert len(graphs) <= 4, "tower and connector, for one tile and for several"


def test_integers_are_not_compiled(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="compiling needs float weights, found int8"):
        smolstack.load(tiny_folder, dtype="int8", compile=True)
