"""Estimate from a file's header how long its decoder will take.

Memory is estimated in decoder_costs.py. A file may also be cheap to send and slow to decode: a
JPEG file that repeats a scan of 40 bytes hundreds of thousands of times, or a format whose decoder
is written in Python, which keeps every other thread of the process waiting.
"""

from __future__ import annotations

import re
from pathlib import Path

from smolstack.errors import ImageError

# Encoders write about ten scans of a progressive image, and at most some dozens.
_SCANS = 100
_SCAN = b"\xff\xda"
# Between a scan's marker and the next one: stuffed bytes, restarts and fill bytes.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a segment
_START_OF_SCAN, _END = 0xDA, 0xD9
# Seconds relative to JPEG, measured with Pillow 13 on a megapixel of noise, roughly.
_WEBP, _AVIF, _JPEG2000, _PYTHON = 3, 5, 20, 20
_PYTHON_BYTES = 2**14  # of a file that Python decodes: two megabytes took more than a second


def check_scans(file: str | Path | bytes) -> None:
    """Reject a JPEG file of very many scans: its decoder passes over all pixels for each.

    Raises:
        ImageError: naming the number.
    """
    if isinstance(file, bytes):
        data = file
    else:
        with open(file, "rb") as opened:
            if opened.read(2) != b"\xff\xd8":
                return
            opened.seek(0)
            data = opened.read()
    if data[:2] == b"\xff\xd8" and data.count(_SCAN) > _SCANS and _scans(data) > _SCANS:
        raise ImageError(f"it is a JPEG file of more than {_SCANS} scans, expected fewer")


def _scans(data: bytes) -> int:
    """Scans of the first image; counting stops above the limit."""
    place, scans = 2, 0
    while scans <= _SCANS:
        found = _MARKER.search(data, place)
        if found is None or found[1][0] == _END:
            break
        place = found.end()
        if found[1][0] in _ALONE:
            continue
        scans += found[1][0] == _START_OF_SCAN
        place += int.from_bytes(data[place : place + 2], "big")
    return scans


def check_pace(file: str | Path | bytes) -> None:
    """Reject a large file whose decoder is written in Python.

    Raises:
        ImageError: naming the kind of file.
    """
    if isinstance(file, bytes) and len(file) > _PYTHON_BYTES and (kind := _python_kind(file[:64])):
        raise ImageError(
            f"it is {kind}, of which {_PYTHON_BYTES:,} bytes are accepted, since its decoder is "
            "slow; expected another format"
        )


def weight(file: object) -> int:
    """How much slower a pixel of a file is to decode than one of a JPEG file, roughly."""
    if not isinstance(file, bytes):
        return 1
    head = file[:64]
    if head[8:12] == b"WEBP":
        return _WEBP
    if head[4:8] == b"ftyp":
        return _AVIF
    if head[:4] == b"\xff\x4f\xff\x51" or head[4:8] == b"jP  ":
        return _JPEG2000
    return _PYTHON if _python_kind(head) else 1


def _python_kind(head: bytes) -> str | None:
    if head[:2] in (b"P1", b"P2", b"P3"):
        return "a PNM file in plain text"
    if head[:2] == b"BM" and len(head) >= 34 and head[30] in (1, 2):
        return "a run-length encoded BMP file"
    return None
