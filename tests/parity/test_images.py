"""Images become the same pixels as in transformers, whatever their size, mode and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from smolstack.interop.reference import image_processor
from smolstack.processor.geometry import plan_tiles
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import cut_tiles, image_size, normalize, open_image

BOUND = 1e-6
MODES = ("RGB", "RGBA", "L", "LA", "P", "P+transparency", "CMYK", "1", "I;16", "HSV", "YCbCr", "I")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SMALL = ImageSettings(longest_edge=128, tile_edge=32)
VARIANTS = (
    SMALL,
    replace(SMALL, longest_edge=100, tile_edge=30),
    replace(SMALL, longest_edge=364, tile_edge=91, mean=MEAN, std=STD),
    replace(SMALL, resample=2),
    replace(SMALL, resample=3),
    replace(SMALL, resample=0),
    replace(SMALL, resize=False, tile_edge=48),
    replace(SMALL, mean=None, std=None),
    replace(SMALL, rescale=None),
    replace(SMALL, rescale=1 / 127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0)),
    replace(SMALL, longest_edge=20, tile_edge=32),
)
PUBLISHED = (
    ImageSettings(longest_edge=2048, tile_edge=512),
    ImageSettings(longest_edge=1536, tile_edge=384),
    ImageSettings(longest_edge=1456, tile_edge=364),
    ImageSettings(longest_edge=1000, tile_edge=300),
    ImageSettings(longest_edge=2048, tile_edge=512, resample=3, mean=MEAN, std=STD),
    ImageSettings(longest_edge=512, tile_edge=512),
)


def _noise(random: np.random.Generator, width: int, height: int, channels: int) -> Any:
    """Smooth areas, edges and noise: what resampling filters treat differently."""
    rows, cols = np.mgrid[0:height, 0:width]
    waves = 127 + 120 * np.sin(rows / 7 + random.uniform(0, 6)) * np.cos(cols / 11)
    base = waves[..., None] + random.normal(0, 25, (height, width, channels))
    return base.clip(0, 255).astype(np.uint8)


def make_image(seed: int, size: tuple[int, int], mode: str) -> Image.Image:
    """An image of a mode, the same for the same seed."""
    random = np.random.default_rng(seed)
    colours = Image.fromarray(_noise(random, *size, 3))
    if mode in ("RGBA", "LA"):
        colours.putalpha(Image.fromarray(_noise(random, *size, 1)[..., 0]))
        return colours.convert(mode)
    if mode.startswith("P"):
        palette = colours.quantize(32)
        if mode != "P":
            palette.info["transparency"] = int(random.integers(0, 32))
        return palette
    if mode in ("I;16", "I"):
        deep = _noise(random, *size, 1)[..., 0].astype(np.uint16) * 257
        image = Image.fromarray(deep)
        return image if mode == "I;16" else image.convert("I")
    return colours.convert(mode)


def _random_size(random: np.random.Generator) -> tuple[int, int]:
    kind = random.integers(0, 6)
    long, short = int(random.integers(1, 400)), int(random.integers(1, 12))
    sizes = (
        (long, int(random.integers(1, 400))),
        (long, short),
        (short, long),
        (1, long),
        (long, 1),
        (int(random.integers(1, 40)), int(random.integers(1, 40))),
    )
    return sizes[kind]


def assert_same_pixels(source: Any, settings: ImageSettings, split: bool, theirs: Any) -> None:
    """Our pixels of ``source`` against transformers' of ``theirs``, with rows and columns."""
    plan = plan_tiles(image_size(source), settings, 1, split)
    ours = normalize(cut_tiles(open_image(source), plan, settings), settings)
    out = image_processor(settings)(
        [theirs], do_image_splitting=split, return_row_col_info=True, return_tensors="pt"
    )
    assert (plan.rows, plan.cols) == (out["rows"][0][0], out["cols"][0][0])
    assert ours.shape == out["pixel_values"][0].shape
    assert out["pixel_attention_mask"].all()
    bound = BOUND if settings.rescale is not None else BOUND * 255
    assert (ours.double() - out["pixel_values"][0].double()).abs().max() <= bound


@pytest.mark.parametrize("seed", range(360))
def test_a_random_image_gives_the_same_pixels(seed: int) -> None:
    random = np.random.default_rng(seed)
    image = make_image(seed, _random_size(random), MODES[seed % len(MODES)])
    settings = VARIANTS[seed // len(MODES) % len(VARIANTS)]
    theirs = image
    if image.mode in ("I;16", "I"):  # transformers cuts these off, and is given their 8 bits
        theirs = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    assert_same_pixels(image, settings, bool(random.integers(0, 2)), theirs)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("settings", PUBLISHED)
def test_published_settings_give_the_same_pixels(settings: ImageSettings, split: bool) -> None:
    for seed, size in enumerate([(811, 540), (97, 410)]):
        image = make_image(seed, size, "RGB")
        assert_same_pixels(image, settings, split, image)


@pytest.mark.parametrize(
    ("size", "resize"),
    [
        ((5000, 300), True), ((5000, 300), False), ((9, 6001), True), ((9, 6001), False),
        ((20000, 1), True), ((4097, 4096), True), ((4500, 700), False),
    ],
)  # fmt: skip
def test_huge_images_give_the_same_pixels(size: tuple[int, int], resize: bool) -> None:
    image = Image.new("RGB", size, (30, 60, 90))
    image.paste((250, 10, 10), (0, 0, size[0] // 3 + 1, size[1] // 2 + 1))
    tile = 32 if resize else 512
    settings = replace(SMALL, resize=resize, tile_edge=tile)
    assert_same_pixels(image, settings, True, image)


def test_more_than_4096_pixels_of_longest_edge_are_cut_back() -> None:
    settings = replace(SMALL, longest_edge=6000, tile_edge=1024)
    image = make_image(1, (61, 9), "RGB")
    assert_same_pixels(image, settings, True, image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_files_are_turned_upright(orientation: int, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    make_image(orientation, (90, 40), mode).save(path, exif=exif)
    for split in (True, False):
        assert_same_pixels(path, SMALL, split, str(path))
        assert_same_pixels(path.read_bytes(), SMALL, split, str(path))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"), ("L", "png"), ("P", "png"), ("1", "png"), ("I;16", "png"), ("RGB", "webp"),
        ("RGB", "gif"), ("L", "tiff"), ("CMYK", "tiff"), ("I;16", "tiff"), ("RGB", "bmp"),
    ],
)  # fmt: skip
def test_files_of_many_kinds_give_the_same_pixels(mode: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    image = make_image(7, (75, 61), mode)
    image.save(path)
    theirs: Any = str(path)
    if mode == "I;16":  # as above
        theirs = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    assert_same_pixels(path, SMALL, True, theirs)


def test_arrays_give_the_same_pixels() -> None:
    array = np.asarray(make_image(8, (70, 33), "RGB"))
    assert_same_pixels(array, SMALL, True, array)


def test_images_that_pillow_has_not_decoded_yet_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(9, (90, 40), "RGB").save(path, exif=exif)
    with Image.open(path) as ours, Image.open(path) as theirs:
        assert isinstance(ours, ImageFile.ImageFile)
        assert_same_pixels(ours, SMALL, True, theirs)
