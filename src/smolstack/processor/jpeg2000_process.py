"""Decode a JPEG 2000 image in a process of its own.

Pillow's decoder of this format, unlike the others, keeps the interpreter's lock: all threads of a
server would wait for it, 0.5 s per megapixel.
"""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from smolstack.processor import limited_process
from smolstack.processor.rgb import to_rgb

_PIXELS = 250_000  # smaller images are decoded faster than a process starts
_SECONDS = 60  # of processor time


def is_worth_it(image: Image.Image) -> bool:
    """Whether other threads would wait for an opened image's decoder."""
    return (
        image.format == "JPEG2000"
        and image.width * image.height > _PIXELS
        and threading.current_thread() is not threading.main_thread()
    )


def decode(file: str | Path | bytes, memory: int) -> Image.Image:
    """Return the image in RGB, upright.

    Args:
        memory: bytes that decoding is estimated to take.

    Raises:
        OSError: it is damaged.
        ImageError: it takes longer or more memory than allowed.
    """
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    answer, pixels = limited_process.call(
        __name__, {}, content, name="the image", seconds=_SECONDS,
        memory=memory + limited_process.EXTRA_BYTES,
    )  # fmt: skip
    if "damaged" in answer:
        raise OSError(answer["damaged"])
    return Image.frombytes("RGB", (answer["width"], answer["height"]), pixels)


def _work(_: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        image = to_rgb(Image.open(BytesIO(content), formats=("JPEG2000",)), upright=True)
    except Exception as error:  # a damaged file's decoder may raise anything
        return {"damaged": str(error) or type(error).__name__}, b""
    return {"width": image.width, "height": image.height}, image.tobytes()


if __name__ == "__main__":
    limited_process.answer_call(_work)
