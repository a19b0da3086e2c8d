"""What a decoder will allocate, counted from a file's header before it runs.

The figures per pixel were measured with Pillow 13 on images of 16 megapixels, as the growth of the
process's largest resident size while one was decoded, and rounded up.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from PIL import Image

from smolstack.errors import ImageError
from smolstack.processor.isobmff import coded_pixels

# Beside the decoded image: coefficients, planes, canvases, rows.
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
_MASKED = 20  # RGBA, a white ground, what both make, and the RGB image of that
_TILE_WIDTH, _TILE_LENGTH, _BITS, _SAMPLES, _ROWS_PER_STRIP = 322, 323, 258, 277, 278


def decoding_bytes(image: Image.Image, file: str | Path | bytes) -> int:
    """Bytes that decoding an opened file takes at its peak, until it is an RGB image.

    Args:
        image: opened, nothing decoded.
        file: what it was opened from.

    Raises:
        ImageError: what the file holds inside is not what its header says.
    """
    form = image.format or ""
    pixels = image.width * image.height
    stored = 4 if image.mode not in ("1", "L", "P", "I;16", "I;16B", "I;16L") else 2
    masked = "A" in image.mode or "transparency" in image.info or form == "ICO"
    each = max(stored + _BESIDE.get(form, _OTHERS), _MASKED if masked else _LEAST)
    return pixels * each + _inside(image, form, file)


def _inside(image: Image.Image, form: str, file: str | Path | bytes) -> int:
    """What depends on more than the number of pixels."""
    if form == "TIFF":
        return _tiff_block(image)
    if form == "ICO":
        _check_icon(image)
    if form in ("AVIF", "HEIF"):
        return max(0, coded_pixels(file) - image.width * image.height) * _BESIDE[form]
    return 0


def _tiff_block(image: Any) -> int:
    """The largest tile or strip of a TIFF file: libtiff makes room for a whole one."""
    tags = image.tag_v2
    bits = tags.get(_BITS, (1,))
    samples = max(1, int(tags.get(_SAMPLES, 1)))
    each = max(4, samples * -(-max(map(int, bits)) // 8))  # 4: as RGBA, where libtiff converts
    if _TILE_WIDTH in tags or _TILE_LENGTH in tags:
        wide, high = int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0))
    else:
        rows = int(tags.get(_ROWS_PER_STRIP, image.height))
        wide, high = image.width, min(rows, image.height)
    return max(0, wide) * max(0, high) * each


def _check_icon(image: Any) -> None:
    """An icon holds an image of its own, which may be of another size than it says."""
    entry = image.ico.entry[image.ico.getentryindex(image.size)]
    file = image.ico.buf
    file.seek(entry.offset)
    head = file.read(24)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 24:
        found = struct.unpack(">II", head[16:24])
    elif len(head) == 24:
        wide, high = struct.unpack("<ii", head[4:12])
        found = (abs(wide), abs(high) // 2)  # the image and its mask
    else:
        raise ImageError("it ends before the image that it names")
    if found != image.size:
        raise ImageError(
            f"it holds an image of {found[0]}x{found[1]} pixels where it says "
            f"{image.width}x{image.height}"
        )
