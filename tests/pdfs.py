"""PDF files for tests: pages of one colour each."""

from __future__ import annotations

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
