"""Films for tests: from black to white, evenly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def film(
    path: Path,
    *,
    frames: int,
    rate: int,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    keyframes: int = 12,
    turned: int = 0,
) -> Path:
    """Write a film of so many frames at ``rate`` a second, its file says that it is ``turned``."""
    av = pytest.importorskip("av")
    pytest.importorskip("num2words")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", keyframes
        if turned:
            stream.set_display_rotation(turned)
        for number in range(frames):
            grey = round(number * 255 / max(1, frames - 1))
            pixels = np.full((size[1], size[0], 3), grey, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
