"""Opening images: what is accepted, what is refused and in which words."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from smolstack.errors import ImageError
from smolstack.processor.geometry import plan_tiles
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import cut_tiles, image_size, normalize, open_image

SETTINGS = ImageSettings(longest_edge=64, tile_edge=32)


def file_bytes(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


def test_a_path_bytes_an_image_and_an_array_are_the_same_image(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    path = tmp_path / "image.png"
    path.write_bytes(file_bytes(image))
    for source in (path, str(path), path.read_bytes(), image, array):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), array)
        assert image_size(source) == (30, 20)


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(file_bytes(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    as_png = file_bytes(palette, transparency=0)
    assert open_image(as_png).getpixel((0, 0)) == (255, 255, 255)


def test_a_photograph_taken_sideways_is_turned_upright() -> None:
    image = Image.new("RGB", (30, 20), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    data = file_bytes(image, exif=exif)
    assert image_size(data) == (20, 30)
    upright = open_image(data)
    assert upright.size == (20, 30)
    assert upright.getpixel((19, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("L", (8, 6), 200).convert(mode) if mode != "I;16" else Image.new(mode, (8, 6))
    opened = open_image(image)
    assert (opened.mode, opened.size) == ("RGB", (8, 6))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="found a folder, expected an image"):
        open_image(tmp_path)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"note\.png .*\(AVIF, BMP"):
        open_image(tmp_path / "note.png")
    with pytest.raises(ImageError, match=r"empty\.png is empty \(0 bytes\)"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="image of 0 bytes is empty"):
        open_image(b"")
    with pytest.raises(ImageError, match="is a URL; images are read from files"):
        open_image("https://example.org/cat.png")
    with pytest.raises(ImageError, match="found a int, expected a path"):
        open_image(7)  # type: ignore[arg-type]


def test_a_truncated_jpeg_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_bytes(Image.fromarray(noise), "JPEG")
    with pytest.raises(ImageError, match="is damaged or truncated"):
        open_image(data[: len(data) // 2])


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 10_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    for act in (open_image, image_size):
        with pytest.raises(ImageError, match=r"60000x60000|20000x10000|too large to decode"):
            act(png_header(*size))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_arrays_of_another_form_are_refused(array: npt.NDArray[Any]) -> None:
    with pytest.raises(ImageError, match=r"expected uint8 \(H, W, 3\)"):
        open_image(array)


def test_tiles_are_cut_row_by_row_and_the_whole_comes_last() -> None:
    # Four quarters of one colour each, already of canvas size: nothing is resampled.
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    image = Image.new("RGB", (64, 64))
    for index, colour in enumerate(colours):
        image.paste(
            colour, (index % 2 * 32, index // 2 * 32, index % 2 * 32 + 32, index // 2 * 32 + 32)
        )
    plan = plan_tiles(image.size, SETTINGS, 4)
    tiles = cut_tiles(image, plan, SETTINGS)
    assert tiles.shape == (5, 3, 32, 32)
    assert tiles.dtype == torch.uint8
    for tile, colour in zip(tiles, colours, strict=False):
        assert (tile == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all()
    assert tiles[4, :, 0, 0].tolist() == [255, 0, 0]
    assert tiles[4, :, 31, 31].tolist() == [255, 255, 0]


def test_a_plan_for_another_image_is_refused() -> None:
    plan = plan_tiles((10, 10), SETTINGS, 4)
    with pytest.raises(ImageError, match="a plan for"):
        cut_tiles(Image.new("RGB", (11, 10)), plan, SETTINGS)


def test_pixels_are_normalized_to_minus_one_and_one() -> None:
    tiles = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    values = normalize(tiles, SETTINGS).flatten()
    assert values.dtype == torch.float32
    assert values[0] == -1
    assert values[2] == 1
    assert float(values[1]) == pytest.approx(128 / 255 * 2 - 1, abs=1e-7)


def test_each_channel_has_its_own_mean_and_std() -> None:
    settings = ImageSettings(64, 32, rescale=1.0, mean=(0, 10, 20), std=(1, 2, 4))
    tiles = torch.full((1, 3, 1, 1), 30, dtype=torch.uint8)
    assert normalize(tiles, settings).flatten().tolist() == [30, 10, 2.5]
