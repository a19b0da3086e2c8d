"""Idefics3Connector, to the letter of its description."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from smolstack import Idefics3Connector
from smolstack.errors import GridError
from smolstack.family import PRESETS

unshuffle = Idefics3Connector.pixel_unshuffle


def numbered(height: int, width: int, channels: int = 1, batch: int = 1) -> Tensor:
    """Patches whose values are 10·index + channel, so that every value tells its origin."""
    index = torch.arange(height * width)[:, None] * 10 + torch.arange(channels)
    return index.expand(batch, -1, -1).clone()


def test_each_block_becomes_one_token_row_by_row() -> None:
    # 4x4 patches, scale 2: the first token holds patches 0, 1 (first row) and 4, 5 (second).
    tokens = unshuffle(numbered(4, 4), 2)
    assert tokens[0].tolist() == [
        [0, 10, 40, 50],
        [20, 30, 60, 70],
        [80, 90, 120, 130],
        [100, 110, 140, 150],
    ]


def test_channels_of_a_patch_stay_together() -> None:
    tokens = unshuffle(numbered(2, 2, channels=3), 2)
    assert tokens[0].tolist() == [[0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]]


def test_an_oblong_grid_is_folded_by_its_own_rows() -> None:
    # 2 rows of 6 patches: token 0 holds 0, 1 and 6, 7.
    tokens = unshuffle(numbered(2, 6), 2, grid=(2, 6))
    assert tokens[0].tolist() == [[0, 10, 60, 70], [20, 30, 80, 90], [40, 50, 100, 110]]
    # The same 12 patches as 6 rows of 2 fold differently.
    tokens = unshuffle(numbered(6, 2), 2, grid=(6, 2))
    assert tokens[0].tolist() == [[0, 10, 20, 30], [40, 50, 60, 70], [80, 90, 100, 110]]


def test_scale_three_on_a_grid_of_nine() -> None:
    tokens = unshuffle(numbered(3, 3), 3)
    assert tokens[0].tolist() == [[0, 10, 20, 30, 40, 50, 60, 70, 80]]


@pytest.mark.parametrize(
    ("side", "scale", "channels", "tokens"),
    [(32, 4, 768, 64), (26, 2, 1152, 169), (27, 3, 1152, 81)],
)
def test_the_published_grids(side: int, scale: int, channels: int, tokens: int) -> None:
    patches = torch.zeros(2, side * side, channels, device="meta")
    assert unshuffle(patches, scale).shape == (2, tokens, scale * scale * channels)


def test_smolvlm_projects_12288_features_to_576_without_a_bias() -> None:
    connector = Idefics3Connector()
    assert connector.proj.in_features == 12_288
    assert connector.proj.out_features == 576
    assert connector.proj.bias is None
    assert connector(torch.zeros(1, 1024, 768)).shape == (1, 64, 576)


@pytest.mark.parametrize("name", PRESETS)
def test_scale_and_widths_come_from_the_config(name: str) -> None:
    config = PRESETS[name].config
    with torch.device("meta"):
        connector = Idefics3Connector.from_config(config)
    assert connector.scale == config.scale
    assert connector.proj.in_features == config.scale**2 * config.vision.hidden_size
    assert connector.proj.out_features == config.text.hidden_size


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    scale=st.integers(1, 4),
    channels=st.integers(1, 3),
    batch=st.integers(0, 3),
)
def test_every_feature_is_where_the_formula_says(
    rows: int, cols: int, scale: int, channels: int, batch: int
) -> None:
    height, width = rows * scale, cols * scale
    patches = torch.arange(batch * height * width * channels).view(batch, height * width, channels)
    tokens = unshuffle(patches, scale, grid=(height, width))
    image = patches.view(batch, height, width, channels)
    for b in range(batch):
        for token in range(rows * cols):
            row, col = divmod(token, cols)
            block = [
                image[b, row * scale + dy, col * scale + dx, c]
                for dy in range(scale)
                for dx in range(scale)
                for c in range(channels)
            ]
            assert tokens[b, token].tolist() == [int(value) for value in block]


@pytest.mark.parametrize(
    ("shape", "scale", "grid", "words"),
    [
        ((1, 12, 4), 2, None, "12 patches"),
        ((1, 16, 4), 2, (4, 5), "grid 4x5 has 20 patches, found 16"),
        ((1, 9, 4), 2, None, "scale 2 does not divide the patch grid 3x3"),
        ((1, 24, 4), 4, (4, 6), "scale 4 does not divide the patch grid 4x6"),
        ((1, 16, 4), 0, None, "scale is 0"),
        ((16, 4), 2, None, r"shape \(16, 4\), expected 3 axes"),
        ((1, 0, 4), 1, None, "0 patches"),
        ((1, 4, 4), 1, (-2, -2), "grid -2x-2"),
        ((1, 16, 4), 2.0, None, "scale is 2.0, expected an integer"),
        ((1, 16, 4), True, None, "scale is True, expected an integer"),
        ((1, 16, 4), 2, (4.0, 4), "height is 4.0, expected an integer"),
        ((1, 16, 4), 2, (4, "4"), "width is '4', expected an integer"),
    ],
)
def test_patches_that_do_not_fit_are_refused_with_their_numbers(
    shape: tuple[int, ...], scale: int, grid: tuple[int, int] | None, words: str
) -> None:
    with pytest.raises(GridError, match=words):
        unshuffle(torch.zeros(shape), scale, grid)


def test_a_wrong_width_is_refused_before_any_work() -> None:
    connector = Idefics3Connector(vision_hidden=8, text_hidden=6, scale=2)
    with pytest.raises(GridError, match=r"7 channels.* 8 channels"):
        connector(torch.zeros(1, 16, 7))


def test_sizes_that_are_not_positive_are_refused() -> None:
    with pytest.raises(GridError, match="scale 0"):
        Idefics3Connector(scale=0)
    with pytest.raises(GridError, match=r"scale is 4\.0, expected an integer"):
        Idefics3Connector(scale=4.0)  # type: ignore[arg-type]
    with pytest.raises(GridError, match=r"vision_hidden .*768\.0"):
        Idefics3Connector(vision_hidden=768.0)  # type: ignore[arg-type]


def test_a_scale_of_numpy_s_is_an_integer() -> None:
    assert unshuffle(numbered(4, 4), np.int64(2)).shape == (1, 4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_works_in_every_float_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    connector = Idefics3Connector(8, 6, 2)
    patches = torch.randn(2, 16, 8)
    expected = connector(patches)
    found = connector.to(dtype)(patches.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_gradients_reach_patches_and_weights() -> None:
    connector = Idefics3Connector(3, 2, 2).double()
    patches = torch.randn(1, 8, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: connector(x, (2, 4)), (patches,))
    connector(patches, (2, 4)).sum().backward()
    assert connector.proj.weight.grad is not None


def test_unshuffling_makes_at_most_one_copy() -> None:
    patches = torch.zeros(5, 1024, 768)
    with torch.profiler.profile(profile_memory=True) as profile:
        tokens = unshuffle(patches, 4)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert tokens.numel() == patches.numel()
    assert allocated <= patches.numel() * patches.element_size() * 1.01


def test_it_compiles_into_one_graph() -> None:
    connector = Idefics3Connector(8, 6, 2)
    compiled = torch.compile(connector, fullgraph=True, backend="aot_eager")
    patches = torch.randn(2, 24, 8)
    torch.testing.assert_close(compiled(patches, (4, 6)), connector(patches, (4, 6)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_every_number_of_patches(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    connector = Idefics3Connector(8, 6, 2)
    compiled = torch.compile(connector, fullgraph=True, dynamic=dynamic, backend=counter)
    for side in range(2, 24, 2):
        patches = torch.randn(2, side * side, 8)
        torch.testing.assert_close(compiled(patches), connector(patches))
    for grid in ((2, 4), (4, 6), (6, 4), (8, 2)):
        patches = torch.randn(2, grid[0] * grid[1], 8)
        torch.testing.assert_close(compiled(patches, grid), connector(patches, grid))
    assert counter.frame_count <= 5  # not one for each of the fifteen shapes


def test_it_exports_with_any_number_of_tiles() -> None:
    connector = Idefics3Connector(8, 6, 2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        connector, (torch.randn(3, 16, 8),), dynamic_shapes={"patches": {0: batch}}
    )
    patches = torch.randn(5, 16, 8)
    torch.testing.assert_close(program.module()(patches), connector(patches))
