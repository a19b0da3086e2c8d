"""Damaged files: whatever a decoder raises is an ImageError, of every format that is accepted.

SMOLSTACK_FUZZ=20 makes twenty times as many of them, with other seeds.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smolstack.errors import ImageError
from smolstack.processor.formats import FORMATS, can_read_heif
from smolstack.processor.pages import tiff_frames
from smolstack.processor.tiles import image_size, open_image

ROUNDS = int(os.environ.get("SMOLSTACK_FUZZ", "1"))
EACH = 2000  # damaged files of a format and round
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF)


def _drawn(mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(5)
    colours = Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    return colours.convert(mode)


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _several() -> dict[str, Any]:
    return {"save_all": True, "append_images": [_drawn().rotate(180)]}


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a sign"
    return exif


def _deep() -> Image.Image:
    return Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 130)


def _photoshop() -> bytes:
    """A PSD file, which Pillow does not write: three channels of 20 rows and 24 columns."""
    head = b"8BPS\0\1" + bytes(6) + b"\0\3" + bytes([0, 0, 0, 20, 0, 0, 0, 24, 0, 8, 0, 3])
    return head + bytes(12) + b"\0\0" + _drawn().tobytes()


def examples(form: str) -> list[bytes]:
    """Files of a format that can be read, of several kinds: (image, options of saving it)."""
    rgb, palette, clear, deep = _drawn(), _drawn("P"), _drawn("RGBA"), _deep()
    turned, several = {"exif": _exif()}, _several()
    kinds: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "PNG": [(rgb, turned), (deep, {}), (palette, {}), (clear, {}), (rgb, several)],
        "TIFF": [
            *((rgb, {"compression": name, **turned})
              for name in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
            (deep, {}), (_drawn("1"), {"compression": "group4"}), (rgb, several),
        ],
        "JPEG": [(rgb, turned), (rgb, {"progressive": True}), (_drawn("CMYK"), {})],
        "WEBP": [(rgb, {}), (clear, {"lossless": True}), (rgb, several)],
        "GIF": [(rgb, {}), (rgb, several)],
        "AVIF": [(rgb, {}), (rgb, several)],
        "MPO": [(rgb, {}), (rgb, several)],
        "PPM": [(rgb, {}), (deep, {}), (_drawn("1"), {})],
        "DDS": [(clear, {}), (clear, {"pixel_format": "DXT5"})],
        "ICO": [(rgb, {"sizes": [(16, 16)]}),
                (rgb, {"sizes": [(16, 16)], "bitmap_format": "bmp"})],
        "TGA": [(rgb, {}), (rgb, {"compression": "tga_rle"}), (palette, {})],
        "BMP": [(rgb, {}), (palette, {})],
        "PCX": [(rgb, {}), (palette, {})],
    }  # fmt: skip
    if form == "PSD":
        return [_photoshop()]
    return [_saved(image, form, **more) for image, more in kinds.get(form, [(rgb, {})])]


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """A file with some bytes changed, removed, repeated or cut off, more often near its start."""
    made = bytearray(data)
    for _ in range(int(random.integers(1, 6))):
        reach = len(made) if random.random() < 0.5 else min(len(made), 96)
        place = int(random.integers(0, max(1, reach)))
        kind = random.integers(0, 6)
        if kind == 0:
            made[place : place + 1] = bytes([int(random.integers(0, 256))])
        elif kind == 1:
            made[place : place + 4] = bytes([int(random.choice(NUMBERS))] * 4)
        elif kind == 2:
            made[place : place + 2] = random.bytes(2)
        elif kind == 3:
            del made[place : place + int(random.integers(1, 9))]
        elif kind == 4:
            made[place:place] = made[place : place + int(random.integers(1, 33))]
        elif random.random() < 0.3:
            del made[place:]
    return bytes(made) or b"\0"


@pytest.mark.parametrize("form", [*FORMATS, "HEIF"])
def test_the_examples_themselves_are_read(form: str) -> None:
    if form == "HEIF" and not can_read_heif():
        pytest.skip("pillow-heif is not installed")
    size = (16, 13) if form == "ICO" else (24, 20)
    for data in examples(form):
        if form == "TIFF" and len(tiff_frames(BytesIO(data))) > 1:
            continue  # refused: it does not say which page
        assert open_image(data).size == image_size(data)
        assert image_size(data) in (size, size[::-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [*FORMATS, "HEIF"])
def test_a_damaged_file_is_read_or_refused_in_a_sentence(form: str) -> None:
    if form == "HEIF" and not can_read_heif():
        pytest.skip("pillow-heif is not installed")
    files = examples(form)
    for number in range(EACH * ROUNDS):
        random = np.random.default_rng(number)
        data = damaged(files[number % len(files)], random)
        size, said = None, ""
        try:
            size = image_size(data, 10**6)
            opened = open_image(data, 10**6)
        except ImageError as error:
            said = str(error)
        if said:
            assert said.startswith(f"image of {len(data)} bytes"), f"{form} {number}"
            assert "\n" not in said
        else:
            assert (opened.mode, opened.size) == ("RGB", size), f"{form} {number}"


def test_a_damaged_tiff_file_writes_nothing_past_the_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """libtiff would print a line for each of its rows."""
    data = bytearray(_saved(Image.new("1", (400, 400)), "TIFF", compression="group4"))
    place = 8
    data[place : place + 40] = bytes(range(3, 43))
    assert open_image(bytes(data)).size == (400, 400)
    assert capfd.readouterr().err == ""
