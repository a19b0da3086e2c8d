"""PDF files for tests: pages of one colour each."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

COLORS = ("red", "lime", "blue")


def document(path: Path, sizes: list[tuple[int, int]], colors: tuple[str, ...] = COLORS) -> Path:
    """Write a PDF file with a page for each size, in 72nds of an inch."""
    pytest.importorskip("pypdfium2")
    first, *rest = (
        Image.new("RGB", size, color) for size, color in zip(sizes, colors, strict=False)
    )
    first.save(path, save_all=True, append_images=rest, resolution=72)
    return path


def locked(path: Path, password: bytes) -> Path:
    """Write a PDF file of one blank page, 100x50, that a password opens (RC4 of 40 bits)."""
    padding = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    padded = (password + padding)[:32]
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    rights = (-4 & 0xFFFFFFFF).to_bytes(4, "little")
    key = hashlib.md5(padded + owner + rights + bytes(16)).digest()[:5]
    parts = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 50]>>",
        f"<</Filter/Standard/V 1/R 2/P -4/O<{owner.hex()}>/U<{_rc4(key, padding).hex()}>>>",
    ]
    body, places = "%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        places.append(len(body))
        body += f"{number} 0 obj{part}endobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    start = len(body)
    body += f"xref\n0 5\n0000000000 65535 f \n{table}trailer<</Size 5/Root 1 0 R/Encrypt 4 0 R"
    path.write_text(f"{body}/ID[<{'00' * 16}><{'00' * 16}>]>>\nstartxref\n{start}\n%%EOF")
    return path


def _rc4(key: bytes, data: bytes) -> bytes:
    state = list(range(256))
    place = 0
    for index in range(256):
        place = (place + state[index] + key[index % len(key)]) % 256
        state[index], state[place] = state[place], state[index]
    made, left, right = bytearray(), 0, 0
    for byte in data:
        left = (left + 1) % 256
        right = (right + state[left]) % 256
        state[left], state[right] = state[right], state[left]
        made.append(byte ^ state[(state[left] + state[right]) % 256])
    return bytes(made)


def nested_forms(depth: int) -> bytes:
    """A page of a few kilobytes that draws 3 to the power of ``depth`` forms inside each other."""
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R"
        "/Resources<</XObject<</F 5 0 R>>>>>>",
        "<</Length 5>>stream\n/F Do\nendstream",
    ]
    for inner in range(depth):
        last = inner == depth - 1
        body = "0 0 9 9 re f" if last else "/F Do /F Do /F Do"
        inside = "" if last else f"/Resources<</XObject<</F {6 + inner} 0 R>>>>"
        objects.append(
            f"<</Type/XObject/Subtype/Form/BBox[0 0 200 200]{inside}/Length {len(body)}>>"
            f"stream\n{body}\nendstream"
        )
    content, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(f"{len(content):010d} 00000 n \n")
        content += f"{number} 0 obj{text}endobj\n".encode()
    table = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{''.join(places)}"
    end = f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{len(content)}\n%%EOF"
    return content + (table + end).encode()
