"""What is saved by work that is not done again: equal tiles, known pictures, known beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smolstack.bench.cases.answers import endless
from smolstack.bench.peers.side import Side
from smolstack.bench.setting import QUESTION, Setting
from smolstack.bench.timing import OURS, Case, Contender
from smolstack.vlm import VLM

PAGE = (1448, 2048)  # A4 upright
TOKENS = 8
_LINES = ("Invoice 4711", "Two chairs, one table", "Total 318.00")


def reuse(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Each saving beside the same work without it."""
    picture = page()
    for dtype in setting.dtypes:
        folder = setting.folder / f"pictures-{dtype}"
        vlm = endless(setting, dtype)
        tiles = _tiles(vlm, picture)
        different = len({tile.numpy().tobytes() for tile in tiles})
        yield Case(
            f"a page of {len(tiles)} tiles, {different} different, {dtype}",
            [
                Contender(OURS, partial(vlm.model.encode_tiles, tiles), dtype),
                Contender("every tile encoded", partial(_one_by_one, vlm, tiles), dtype),
            ],
        )
        yield Case(
            f"asking about the page again, {TOKENS} tokens, {dtype}",
            [
                Contender(OURS, partial(_again, vlm, picture, picture_kept=True), dtype),
                Contender("picture kept alone", partial(_picture_alone, vlm, picture), dtype),
                Contender("picture kept on disk", partial(_from_disk, vlm, picture, folder), dtype),
                Contender("nothing kept", partial(_again, vlm, picture), dtype),
            ],
        )


def page() -> Image.Image:
    """A page whose text stands at its top; the rest is white."""
    image = Image.new("RGB", PAGE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(48)
    for row, line in enumerate(_LINES):
        draw.text((96, 96 + 80 * row), line, "black", font)
    return image


def _tiles(vlm: VLM, picture: Image.Image) -> Tensor:
    return vlm.processor.pixels(picture, vlm.processor.plan(picture))


def _one_by_one(vlm: VLM, tiles: Tensor) -> Tensor:
    """Every tile by itself: nothing that could be seen to be equal."""
    return torch.cat([vlm.model.encode_tiles(tile[None]) for tile in tiles])


def _again(vlm: VLM, picture: Image.Image, picture_kept: bool = False) -> None:
    """The question once more; the round before has left picture and beginning, unless dropped."""
    if not picture_kept:
        vlm.forget()
    vlm.ask(picture, QUESTION, max_new_tokens=TOKENS)


def _from_disk(vlm: VLM, picture: Image.Image, folder: Path) -> None:
    """As a new process would: nothing in memory, the visual tokens in a folder."""
    vlm.forget()
    vlm.picture_cache.folder = folder
    try:
        vlm.ask(picture, QUESTION, max_new_tokens=TOKENS)
    finally:
        vlm.picture_cache.folder = None


def _picture_alone(vlm: VLM, picture: Image.Image) -> None:
    vlm.forget_conversation()
    vlm.ask(picture, QUESTION, max_new_tokens=TOKENS)
