"""Where transformers is wrong or undefined, as docs/parity.md says: each case, run.

A test that fails here after an upgrade of transformers means that the page is out of date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smolstack.checkpoint.new import random_model
from smolstack.family import PRESETS
from smolstack.interop.miniature import miniature
from smolstack.interop.reference import image_processor, share_model
from smolstack.model.connector import Idefics3Connector
from smolstack.processor.geometry import plan_tiles
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import open_image

SMALL = ImageSettings(longest_edge=128, tile_edge=32)


def _mean(source: Any) -> float:
    out = image_processor(SMALL)([source], return_tensors="pt")
    return float(out["pixel_values"].mean())


def test_a_transparent_file_is_white_here_and_black_in_transformers(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    path = tmp_path / "clear.png"
    clear.save(path)
    assert _mean(clear) == 1
    assert _mean(str(path)) == -1
    assert np.asarray(open_image(path)).min() == np.asarray(open_image(clear)).min() == 255


def test_sixteen_bit_greys_are_cut_off_at_255_by_transformers_and_scaled_here() -> None:
    deep = Image.fromarray(np.full((32, 32), 30000, np.uint16))
    assert _mean(deep) == 1
    assert np.asarray(open_image(deep)).min() == round(30000 / 65535 * 255)


def test_its_count_of_tiles_differs_from_its_split_where_the_edge_is_no_multiple() -> None:
    settings = ImageSettings(longest_edge=1000, tile_edge=300)
    plan = plan_tiles((1533, 810), settings, 1)
    assert (plan.tiles, plan.rows, plan.cols) == (13, 3, 4)  # as its split, see test_planner
    assert image_processor(settings).get_number_of_image_patches(810, 1533) == (9, 2, 4)


def test_its_count_of_tiles_of_an_unsplit_image_is_zero() -> None:
    settings = ImageSettings(longest_edge=512, tile_edge=512)
    assert image_processor(settings).get_number_of_image_patches(100, 100)[0] == 0
    assert plan_tiles((100, 100), settings, 1).tiles == 1


@pytest.mark.parametrize("name", ["smolvlm-256m", "smolvlm2-256m"])
def test_an_image_that_normalizes_to_zero_vanishes_from_transformers(name: str) -> None:
    config = miniature(PRESETS[name], layers=1).config
    model = random_model(config)
    tiles = torch.stack((torch.randn(3, 512, 512), torch.zeros(3, 512, 512)))
    ids = torch.full((1, 2 * config.tokens_per_tile), config.image_token_id)
    with pytest.raises(ValueError, match="do not match"):
        share_model(model)(input_ids=ids, pixel_values=tiles[None])
    with torch.inference_mode():
        assert model.encode_tiles(tiles).shape[0] == 2


def test_oblong_grids_are_scrambled_by_its_connector() -> None:
    config = miniature(PRESETS["smolvlm-256m"], layers=1).config
    connector = share_model(random_model(config)).model.connector
    width = config.vision.hidden_size
    numbers = torch.arange(16 * 64.0)[None, :, None].expand(1, -1, width).contiguous()
    theirs = connector.pixel_shuffle(numbers, 4)[0, 0].view(16, width)[:, 0].tolist()
    ours = Idefics3Connector.pixel_unshuffle(numbers, 4, (16, 64))[0, 0].view(16, width)[:, 0]
    assert theirs[:8] == [0, 1, 2, 3, 32, 33, 34, 35]  # of a 32x32 grid that is not there
    assert ours.tolist()[:8] == [0, 1, 2, 3, 64, 65, 66, 67]
