"""Greys of more than 8 bits are scaled by their range, whatever file they come in."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from smolstack.errors import ImageError
from smolstack.processor.tiles import open_image

DEEP = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def greys(source: Any) -> list[int]:
    pixels = np.asarray(open_image(source))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return [int(value) for value in pixels[0, :, 0]]


def tiff(
    values: npt.NDArray[Any], order: str, bits: int, kind: int = 1, photometric: int = 1
) -> bytes:
    """A TIFF file of one row in a byte order; ``kind`` 1 is unsigned, 2 signed, 3 float."""
    data = (values.byteswap() if order == ">" else values).tobytes()
    tags = [(256, values.shape[1]), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8),
            (277, 1), (278, 1), (279, len(data)), (339, kind)]  # fmt: skip
    place = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", place)
    body = data + bytes(len(data) % 2)
    return head + body + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def test_sixteen_bits_in_every_format() -> None:
    image = Image.fromarray(DEEP)
    for form in ("PNG", "TIFF", "PPM", "JPEG2000"):
        more = {"irreversible": False} if form == "JPEG2000" else {}
        assert greys(saved(image, form, **more)) == [0, 1, 128, 255], form
    assert greys(image) == [0, 1, 128, 255]
    assert greys(Image.fromarray(DEEP.astype(np.int32))) == [0, 1, 128, 255]


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_files_of_both_byte_orders(order: str) -> None:
    assert greys(tiff(DEEP, order, 16)) == [0, 1, 128, 255]
    assert greys(tiff(DEEP.astype(np.int32), order, 32, kind=2)) == [0, 1, 128, 255]
    fractions = np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)
    assert greys(tiff(fractions, order, 32, kind=3)) == [0, 64, 128, 255]
    assert greys(tiff(fractions, order, 32, kind=3, photometric=0)) == [255, 191, 128, 0]


def test_a_tiff_file_whose_zero_is_white() -> None:
    assert greys(tiff(DEEP, "<", 16, photometric=0)) == [255, 254, 127, 0]


def test_twelve_bits_are_white_at_4095() -> None:
    packed = np.frombuffer(bytes([0x00, 0x07, 0xFF, 0xFF, 0xF0, 0x00]), dtype=np.uint8)[None]
    data = bytearray(tiff(packed, "<", 12))
    data = data.replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4))
    assert greys(bytes(data)) == [0, 127, 255, 0]


def test_a_grey_map_of_any_largest_value() -> None:
    assert greys(b"P2 4 1 1023\n0 4 512 1023\n") == [0, 1, 128, 255]
    assert greys(b"P5 2 1 65535\n\x00\x00\xff\xff") == [0, 255]


def test_a_transparent_grey_is_white() -> None:
    assert greys(saved(Image.fromarray(DEEP), "PNG", transparency=257)) == [0, 255, 128, 255]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            np.array([[0.0, 255.0]], dtype=np.float32),
            r"range from 0 to 255, expected floats",
        ),
        (np.array([[-0.5, 0.5]], dtype=np.float32), r"range from -0\.5 to 0\.5, expected floats"),
        (np.array([[np.nan, 0.5]], dtype=np.float32), "range from nan to nan, expected floats"),
        (np.array([[0, 70_000]], dtype=np.int32), "from 0 to 70000, expected integers from 0 to 6"),
        (np.array([[-1, 5]], dtype=np.int32), "from -1 to 5, expected integers from 0 to 65535"),
    ],
)
def test_what_lies_outside_of_its_range_is_refused_by_name(
    values: npt.NDArray[Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "scan.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ImageError, match=rf"scan\.tif: its gray values \(mode [IF]\) .*{said}"):
        open_image(path)
    with pytest.raises(ImageError, match=f"the image: .*{said}"):
        open_image(Image.fromarray(values))
