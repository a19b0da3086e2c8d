"""Read PNG metadata that follows the pixel data, without decoding pixels."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

_CHUNKS = 100_000  # maximum chunks examined
_WORDS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_MOST = 2**24  # maximum bytes of all of them
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def late_words(file: BinaryIO) -> bytes | None:
    """A one-pixel PNG with the file's metadata; None if no metadata follows the pixel data.

    Args:
        file: an opened PNG file; its position is kept.
    """
    before, pixels, late, size = file.tell(), False, False, 0
    words: list[bytes] = []
    file.seek(len(_SIGNATURE))
    for _ in range(_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            break
        if kind in _WORDS and size + length <= _MOST:
            words.append(head + file.read(length + 4))
            size, late = size + length, late or pixels
            continue
        pixels = pixels or kind == b"IDAT"
        file.seek(length + 4, 1)
    file.seek(before)
    if not late:
        return None
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixel = _chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"".join([_SIGNATURE, _chunk(b"IHDR", header), *words, pixel, _chunk(b"IEND", b"")])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
