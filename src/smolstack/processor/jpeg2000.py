"""Memory that a JPEG 2000 file's decoder allocates in addition to the pixels.

OpenJPEG keeps a structure for every code block and for every tile, so a file of a few kilobytes
whose code blocks are the smallest ones takes a hundred bytes per pixel. It also decodes what the
codestream says, whatever the file's header does. Markers are those of ISO/IEC 15444-1, annex A.
"""

from __future__ import annotations

import math
import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from smolstack.errors import ImageError
from smolstack.processor.isobmff import boxes

# Measured with Pillow 13 (OpenJPEG 2.5): 400 for a block, 9,000 for a tile of three components.
_BLOCK_BYTES, _TILE_BYTES = 450, 12_000
_COMPONENTS = 4  # that Pillow decodes
_HEADER_BYTES = 2**20  # of the codestream's main header, at most
_PARTS = 65_535  # of tiles, that are looked at
_SOC, _SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFF4F, 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
# Segments that a header may hold. Behind any other one, decoders go on in ways of their own.
_KNOWN = frozenset(
    (_SIZ, _COD, _COC, 0xFF50, 0xFF55, 0xFF57, 0xFF58, 0xFF59, 0xFF5C, 0xFF5D, 0xFF5E, 0xFF5F,
     0xFF60, 0xFF61, 0xFF63, 0xFF64, 0xFF74, 0xFF75, 0xFF77, 0xFF78)
)  # fmt: skip


def structure_bytes(file: str | Path | bytes, size: tuple[int, int]) -> int:
    """Bytes of the structures that decoding a JPEG 2000 file takes.

    Args:
        size: (width, height) that the file's header says.

    Raises:
        ImageError: the codestream is of another size, or cannot be followed.
    """
    if isinstance(file, bytes):
        return _structure_bytes(BytesIO(file), size)
    with open(file, "rb") as opened:
        return _structure_bytes(opened, size)


def _structure_bytes(file: BinaryIO, size: tuple[int, int]) -> int:
    start = 0
    if file.read(2) != b"\xff\x4f":
        found = (start for kind, start, _ in boxes(file) if kind == b"jp2c")
        start = next(found, -1)
        if start < 0:
            raise ImageError("it is a JPEG 2000 file without a codestream")
    file.seek(start + 2)
    marker, content = _segment(file)
    if marker != _SIZ or len(content) < 36:
        raise ImageError("its codestream does not begin with its size")
    wide, high, left, top, tile_wide, tile_high, tile_left, tile_top, components = (
        struct.unpack_from(">8IH", content, 2)
    )
    if (wide - left, high - top) != size or not 1 <= components <= _COMPONENTS:
        raise ImageError(
            f"its header says {size[0]}x{size[1]} pixels, and its codestream "
            f"{wide - left}x{high - top} of {components} components"
        )
    if not tile_wide or not tile_high:
        raise ImageError("its tiles have no pixels")
    across = math.ceil((wide - tile_left) / tile_wide)
    down = math.ceil((high - tile_top) / tile_high)
    pixels = min(size[0], tile_wide) * min(size[1], tile_high)  # decoded one tile at a time
    blocks = int(components * pixels / _smallest_block(file))
    count: int = blocks * _BLOCK_BYTES + across * down * _TILE_BYTES
    return count


def _smallest_block(file: BinaryIO) -> int:
    """Samples of the smallest code block that the headers allow; ``file`` is behind SIZ."""
    smallest, parts, read = 2**12, 0, 0
    while parts < _PARTS and read < _HEADER_BYTES:
        place = file.tell()
        marker, content = _segment(file)
        read += len(content) + 4
        if marker == _SOT and len(content) == 8:
            (length,) = struct.unpack_from(">I", content, 2)
            following = place + length if length else None
            parts += 1
            while True:  # the tile's own header
                marker, content = _segment(file)
                if marker in (_SOD, _EOC):
                    break
                read += len(content) + 4
                smallest = min(smallest, _block(marker, content))
            if following is None or following <= place:
                return smallest
            file.seek(following)
        elif marker in (_EOC, 0):
            return smallest
        else:
            smallest = min(smallest, _block(marker, content))
    raise ImageError(f"its headers have more than {_PARTS:,} tile parts or {_HEADER_BYTES:,} bytes")


def _segment(file: BinaryIO) -> tuple[int, bytes]:
    """(marker, content) of the next segment; (0, empty) where the file ends."""
    head = file.read(2)
    if len(head) < 2:
        return _EOC, b""
    (marker,) = struct.unpack(">H", head)
    if marker in (_SOD, _EOC):
        return marker, b""
    if marker != _SOT and marker not in _KNOWN:
        raise ImageError(f"its codestream has the marker {marker:04X} within a header")
    size = file.read(2)
    length = struct.unpack(">H", size)[0] if len(size) == 2 else 0
    content = file.read(max(0, length - 2))
    if length < 2 or len(content) < length - 2:
        return _EOC, b""
    return marker, content


def _block(marker: int, content: bytes) -> int:
    """Samples of a code block by COD or COC, its precincts considered."""
    if marker == _COD and len(content) >= 10:
        precincts, style = content[0] & 1, content[5:]
    elif marker == _COC and len(content) >= 7:  # at most four components: one byte names one
        precincts, style = content[1] & 1, content[2:]
    else:
        return 2**12
    levels, wide, high = style[0], (style[1] & 15) + 2, (style[2] & 15) + 2
    smallest: int = 2 ** (wide + high)
    if precincts:
        for level, size in enumerate(style[5 : 6 + levels]):
            # Above the lowest level a precinct covers three subbands of half its side.
            half = 1 if level else 0
            across = min(wide, max(0, (size & 15) - half))
            down = min(high, max(0, (size >> 4) - half))
            smallest = min(smallest, 2 ** (across + down))
    return smallest
