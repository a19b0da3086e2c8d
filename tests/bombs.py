"""Small files that ask for much memory."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image


def tiff(side: int, tile: int) -> bytes:
    """A grey TIFF file of side x side pixels in one tile of tile x tile, of a few bytes."""
    data = zlib.compress(bytes(100))
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile),
            (323, tile), (324, 8), (325, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def icon(side: int) -> bytes:
    """An icon that says 16x16 and holds a PNG of side x side."""
    buffer = BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    inside = buffer.getvalue()
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inside
