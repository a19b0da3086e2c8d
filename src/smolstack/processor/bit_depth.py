"""Scale grayscale of more than 8 bits to 8 bits by its range, where Pillow would clip it.

This differs from transformers, which uses ``convert("RGB")``: that turns every gray above 255
white, and every float below 1 black.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from smolstack.errors import ImageError

MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_HIGHEST = 65535
_BITS, _PHOTOMETRIC = 258, 262
_ROWS = 1024  # rows scaled at once


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grayscale of more than 8 bits."""
    return image.mode in MODES


def to_grey(image: Image.Image) -> Image.Image:
    """Convert a deep image to mode L.

    Integers from 0 to 65535 (or the bit depth given in a TIFF file) and floats from 0 to 1 become 0
    to 255. A transparent gray becomes white.

    Raises:
        ImageError: a value is out of range.
    """
    values = np.asarray(image)
    highest, inverted = _meaning(image)
    lowest, largest = values.min(), values.max()
    if not (lowest >= 0 and largest <= highest):  # this form also rejects NaN
        kind = "floats from 0 to 1" if image.mode == "F" else f"integers from 0 to {highest}"
        raise ImageError(
            f"its gray values (mode {image.mode}) range from {lowest:g} to {largest:g}, expected "
            f"{kind}; scale them first"
        )
    grey = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), _ROWS):
        part = values[start : start + _ROWS].astype(np.float64)
        scaled = part * (255 / highest)
        grey[start : start + _ROWS] = np.rint(255 - scaled if inverted else scaled)
    clear = image.info.get("transparency")
    if isinstance(clear, int) and image.mode != "F":
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _meaning(image: Any) -> tuple[int, bool]:
    """The value of white, and whether the scale is inverted, as TIFF files allow."""
    highest = 1 if image.mode == "F" else _HIGHEST
    tags: Any = getattr(image, "tag_v2", None)
    if tags is None:
        return highest, False
    bits = tags.get(_BITS, (16,))
    if image.mode != "F" and max(bits) < 16:
        highest = 2 ** max(bits) - 1
    return highest, tags.get(_PHOTOMETRIC) == 0
