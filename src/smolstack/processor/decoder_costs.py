"""Estimate from a file's header how much memory its decoder will allocate.

The figures per pixel were measured with Pillow 13 on images of 16 megapixels, as the increase in
peak resident memory of the process while decoding one, and rounded up.
"""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from smolstack.errors import ImageError
from smolstack.processor.isobmff import coded_pixels
from smolstack.processor.jpeg2000 import structure_bytes

# In addition to the decoded image: coefficients, planes, canvases, rows.
_BESIDE = {
    "JPEG": 8,  # the coefficients of a progressive file: two bytes for each of four components
    "MPO": 8,
    "WEBP": 14,
    "AVIF": 20,
    "HEIF": 20,
    "JPEG2000": 22,
    "GIF": 9,
    "SGI": 6,
    "QOI": 4,
}
_OTHERS = 4
_LEAST = 12  # an RGB image (4 bytes in Pillow) and two copies while its tiles are cut
_MASKED = 20  # RGBA, a white background, the composite, and its RGB image
_ICON_PIXELS = 2**20  # of an image in an icon, at most 256x256 by the format
_TILE_PIXELS = 2**22  # of a tile that is larger than its image
_TILE_WIDTH, _TILE_LENGTH, _BITS, _SAMPLES, _ROWS_PER_STRIP = 322, 323, 258, 277, 278


def decoding_bytes(image: Image.Image, file: str | Path | bytes) -> int:
    """Peak bytes of decoding an opened file to an RGB image.

    Args:
        image: opened, not decoded.
        file: the file it was opened from.

    Raises:
        ImageError: the file's tiles are much larger than its image.
    """
    form = image.format or ""
    pixels = image.width * image.height
    stored = 4 if image.mode not in ("1", "L", "P", "I;16", "I;16B", "I;16L") else 2
    masked = "A" in image.mode or "transparency" in image.info or form == "ICO"
    each = max(stored + _BESIDE.get(form, _OTHERS), _MASKED if masked else _LEAST)
    return pixels * each + _inside(image, form, file)


def _inside(image: Image.Image, form: str, file: str | Path | bytes) -> int:
    """Memory that depends on more than the number of pixels."""
    if form == "TIFF":
        return _tiff_block(image)
    if form == "JPEG2000":
        return structure_bytes(file, image.size)
    if form in ("AVIF", "HEIF"):
        return max(0, coded_pixels(file) - image.width * image.height) * _BESIDE[form]
    return 0


def _tiff_block(image: Any) -> int:
    """The largest tile or strip of a TIFF file: libtiff allocates a whole one."""
    tags = image.tag_v2
    bits = tags.get(_BITS, (1,))
    samples = max(1, int(tags.get(_SAMPLES, 1)))
    each = max(4, samples * -(-max(map(int, bits)) // 8))  # 4: as RGBA, where libtiff converts
    if _TILE_WIDTH in tags or _TILE_LENGTH in tags:
        wide, high = int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0))
        if wide * high > 4 * image.width * image.height + _TILE_PIXELS:
            raise ImageError(
                f"it has {image.width}x{image.height} pixels in tiles of {wide}x{high}, expected "
                "tiles that are not much larger than the image"
            )
    else:
        rows = int(tags.get(_ROWS_PER_STRIP, image.height))
        wide, high = image.width, min(rows, image.height)
    return max(0, wide) * max(0, high) * each


def check_icon(file: str | Path | bytes) -> None:
    """Reject an icon that contains a large image, because Pillow decodes it on opening.

    Raises:
        ImageError: naming the size.
    """
    if isinstance(file, bytes):
        _check_icon(BytesIO(file))
    else:
        with open(file, "rb") as opened:
            _check_icon(opened)


def _check_icon(file: BinaryIO) -> None:
    head = file.read(6)
    if head[:4] != b"\0\0\1\0":
        return
    entries = file.read(16 * struct.unpack("<H", head[4:6])[0])
    for start in range(0, len(entries) - 15, 16):
        (place,) = struct.unpack_from("<I", entries, start + 12)
        file.seek(place)
        inside = file.read(24)
        if len(inside) < 24:
            continue
        if inside[:8] == b"\x89PNG\r\n\x1a\n":
            wide, high = struct.unpack(">II", inside[16:24])
        else:
            wide, high = struct.unpack("<ii", inside[4:12])
            wide, high = abs(wide), abs(high) // 2  # the image stands above its mask
        if wide * high > _ICON_PIXELS:
            said = f"{entries[start] or 256}x{entries[start + 1] or 256}"
            raise ImageError(f"it is an icon of {said} that holds an image of {wide}x{high}")
