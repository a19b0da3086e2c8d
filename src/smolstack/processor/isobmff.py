"""The actual sizes of the images in an AVIF or HEIF file, regardless of its header.

The decoders make room for what the coded data says, and compare it with the header afterwards.
Boxes are those of ISO/IEC 14496-12 and 23008-12, the sequence header that of AV1 (section 5.5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

_HEADER_BYTES = 4 * 2**20  # of the box that describes the items, at most
_BOXES = _UNITS = 10_000  # that are looked at
_SEQUENCE_HEADER = 1


def coded_pixels(file: str | Path | bytes) -> int:
    """Pixels of the largest image in the file; 0 if it does not give them."""
    if isinstance(file, bytes):
        return _coded_pixels(BytesIO(file))
    with open(file, "rb") as opened:
        return _coded_pixels(opened)


def _coded_pixels(file: BinaryIO) -> int:
    largest = 0
    for kind, start, size in boxes(file):
        if kind not in (b"meta", b"moov"):
            continue
        file.seek(start)
        content = file.read(min(size, _HEADER_BYTES))
        for place in _places(content, b"ispe"):
            if len(content) >= place + 16:
                wide, high = struct.unpack_from(">II", content, place + 8)
                largest = max(largest, wide * high)
        streams = [(start + place + 8, 512) for place in _places(content, b"av1C")]
        streams += _items(content) if kind == b"meta" else _chunks(content)
        largest = max([largest, *(_in_stream(file, *stream) for stream in streams)])
    return largest


def boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its content starts, its size) of the outermost boxes."""
    place = 0
    for _ in range(_BOXES):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return
        size, kind = struct.unpack(">I4s", head[:8])
        start = place + 8
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack(">Q", head[8:])
            start = place + 16
        elif size == 0:
            size = _HEADER_BYTES  # to the end of the file
        if size < 8:
            return
        yield kind, start, size - (start - place)
        place += size


def _places(content: bytes, mark: bytes) -> Iterator[int]:
    place = content.find(mark)
    while place >= 0:
        yield place
        place = content.find(mark, place + 4)


def _items(content: bytes) -> list[tuple[int, int]]:
    """(place, size) of the items' first parts, from the box iloc."""
    place = content.find(b"iloc")
    found: list[tuple[int, int]] = []
    try:
        version, sizes = content[place + 4], struct.unpack_from(">H", content, place + 8)[0]
        offset, length, base = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
        index = sizes & 15 if version in (1, 2) else 0
        at, wide = place + 10, 4 if version == 2 else 2
        count = int.from_bytes(content[at : at + wide], "big")
        at += wide
        for _ in range(min(count, _BOXES)):
            at += wide + (2 if version in (1, 2) else 0) + 2
            start = int.from_bytes(content[at : at + base], "big")
            at += base
            (parts,) = struct.unpack_from(">H", content, at)
            at += 2
            for part in range(parts):
                at += index
                first = int.from_bytes(content[at : at + offset], "big")
                size = int.from_bytes(content[at + offset : at + offset + length], "big")
                at += offset + length
                if part == 0:
                    found.append((start + first, size))
            if at > len(content):
                break
    except (struct.error, IndexError):
        pass
    return found if place >= 0 else []


def _chunks(content: bytes) -> list[tuple[int, int]]:
    """(place, size at most) of the first chunk of each track, from the boxes stco and co64."""
    found = []
    for mark, form in ((b"stco", ">I"), (b"co64", ">Q")):
        for place in _places(content, mark):
            if len(content) >= place + 20:
                found.append((struct.unpack_from(form, content, place + 12)[0], 2**20))
    return found


def _in_stream(file: BinaryIO, place: int, size: int) -> int:
    """Pixels of the largest frame that the sequence headers of an AV1 stream allow."""
    largest, end = 0, place + size
    for _ in range(_UNITS):
        if place >= end or place > 2**40:
            break
        file.seek(place)
        head = file.read(10)
        if len(head) < 2:
            break
        kind, extended, sized = head[0] >> 3 & 15, head[0] >> 2 & 1, head[0] >> 1 & 1
        length, used = _leb128(head[1 + extended :]) if sized else (end - place - 1, 0)
        start = place + 1 + extended + used
        if kind == _SEQUENCE_HEADER:
            file.seek(start)
            largest = max(largest, _frame_pixels(file.read(min(max(length, 0), 1024))))
        place = start + max(length, 0)
    return largest


def _leb128(data: bytes) -> tuple[int, int]:
    """A number of seven bits a byte, and how many bytes it took."""
    value = 0
    for index, byte in enumerate(data[:8]):
        value |= (byte & 127) << 7 * index
        if not byte & 128:
            return value, index + 1
    return value, len(data[:8])


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def __call__(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise EOFError
        return self.value >> self.left & ((1 << count) - 1)


def _frame_pixels(data: bytes) -> int:
    """Pixels of the largest frame, from a sequence header."""
    bits = _Bits(data)
    try:
        bits(4)
        if bits(1):  # of a still image, shortened
            bits(5)
        else:
            _skip_timing(bits)
        wide_bits, high_bits = bits(4) + 1, bits(4) + 1
        return (bits(wide_bits) + 1) * (bits(high_bits) + 1)
    except EOFError:
        return 0


def _skip_timing(bits: _Bits) -> None:
    delay, modelled = 0, 0
    if bits(1):  # timing
        bits(64)
        if bits(1):
            zeros = 0
            while not bits(1):
                zeros += 1
            bits(min(zeros, 32))
        modelled = bits(1)
        if modelled:
            delay = bits(5) + 1
            bits(42)
    shown_later, points = bits(1), bits(5) + 1
    for _ in range(points):
        bits(12)
        if bits(5) > 7:
            bits(1)
        if modelled and bits(1):
            bits(2 * delay + 1)
        if shown_later and bits(1):
            bits(4)
