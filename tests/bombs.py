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


def scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG file of one colour whose last scan is repeated so many times."""
    buffer = BytesIO()
    Image.new("L", (side, side), 90).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content[content.rfind(b"\xff\xc4") : -2]
    return content[:-2] + last * count + content[-2:]


def reduced(count: int, kind: int = 1) -> bytes:
    """A TIFF file of 16x16 pixels with so many reduced images, all of them the same, before its
    page; kind 0: with so many other pages."""
    entry = struct.Struct("<HHII")
    tags = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16),
            (279, 256)]  # fmt: skip
    page = b"".join(entry.pack(tag, 4, 1, value) for tag, value in tags)
    made = bytearray(b"II*\0" + struct.pack("<I", 8 + 256) + bytes(256))
    for _ in range(count):
        following = len(made) + 2 + 10 * entry.size + 4
        made += struct.pack("<H", 10) + entry.pack(254, 4, 1, kind) + page
        made += struct.pack("<I", following)
    return bytes(made + struct.pack("<H", 9) + page + bytes(4))


def plain_ppm(side: int) -> bytes:
    """A PPM file in plain text, whose decoder is slow."""
    return b"P3 %d %d 9 " % (side, side) + b"1 " * (3 * side * side)


def run_length_bmp(side: int) -> bytes:
    """A BMP file of runs of one pixel each, whose decoder is slow."""
    rows = (b"\1\5" * side + b"\0\0") * side + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = bytes(range(256)) * 4
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows
