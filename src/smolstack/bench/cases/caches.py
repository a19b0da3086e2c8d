"""Time saved by caches: equal tiles, known images, known prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smolstack.bench.cases.answers import endless
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import OURS, Case, Contender
from smolstack.bench.workload import QUESTION, Workload
from smolstack.vlm import VLM

PAGE = (1448, 2048)  # A4 upright
TOKENS = 8
_LINES = ("Invoice 4711", "Two chairs, one table", "Total 318.00")


def reuse(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Each cached operation, and the same work without the cache."""
    image = page()
    for dtype in workload.dtypes:
        folder = workload.folder / f"images-{dtype}"
        vlm = endless(workload, dtype)
        tiles = _tiles(vlm, image)
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
                Contender(OURS, partial(_again, vlm, image, image_kept=True), dtype),
                Contender("image kept alone", partial(_image_alone, vlm, image), dtype),
                Contender("image kept on disk", partial(_from_disk, vlm, image, folder), dtype),
                Contender("nothing kept", partial(_again, vlm, image), dtype),
            ],
        )


def page() -> Image.Image:
    """Return a page with text at the top; the rest is white."""
    image = Image.new("RGB", PAGE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(48)
    for row, line in enumerate(_LINES):
        draw.text((96, 96 + 80 * row), line, "black", font)
    return image


def _tiles(vlm: VLM, image: Image.Image) -> Tensor:
    return vlm.processor.pixels(image, vlm.processor.plan(image))


def _one_by_one(vlm: VLM, tiles: Tensor) -> Tensor:
    """Encode every tile separately, so that equal tiles are not detected."""
    return torch.cat([vlm.model.encode_tiles(tile[None]) for tile in tiles])


def _again(vlm: VLM, image: Image.Image, image_kept: bool = False) -> None:
    """Ask the question again; the previous round has left image and prefix in the caches, unless
    dropped.
    """
    if not image_kept:
        vlm.clear_caches()
    vlm.ask(image, QUESTION, max_new_tokens=TOKENS)


def _from_disk(vlm: VLM, image: Image.Image, folder: Path) -> None:
    """As in a new process: nothing in memory, visual tokens in a folder."""
    vlm.clear_caches()
    vlm.image_cache.folder = folder
    try:
        vlm.ask(image, QUESTION, max_new_tokens=TOKENS)
    finally:
        vlm.image_cache.folder = None


def _image_alone(vlm: VLM, image: Image.Image) -> None:
    vlm.clear_prefix_cache()
    vlm.ask(image, QUESTION, max_new_tokens=TOKENS)
