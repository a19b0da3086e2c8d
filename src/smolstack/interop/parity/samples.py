"""The images and prompts that ``make parity`` compares on; made by formulas, never fetched."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from smolstack.processor.prompt import Message

# (width, height), mode, split. Together: a grid, a single tile, each kind of transparency, an
# image one pixel wide, one larger than any resize.
IMAGES: tuple[tuple[tuple[int, int], str, bool], ...] = (
    ((640, 480), "RGB", True),
    ((640, 480), "RGB", False),
    ((301, 700), "RGBA", True),
    ((120, 33), "LA", False),
    ((97, 211), "P", True),
    ((200, 100), "CMYK", False),
    ((64, 64), "I;16", False),
    ((1, 300), "L", True),
    ((4200, 1500), "RGB", True),
)


def sample_image(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Waves, an edge and noise in a mode of Pillow's; palettes have a transparent colour."""
    random = np.random.default_rng(seed)
    rows, cols = np.mgrid[0 : size[1], 0 : size[0]]
    waves = 127 + 110 * np.sin(rows / 9 + seed) * np.cos(cols / 13)
    colours = waves[..., None] + random.normal(0, 25, (size[1], size[0], 3))
    colours[:, : size[0] // 3] *= 0.4
    image = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(waves.clip(0, 255).astype(np.uint8)))
    if mode == "P":
        image = image.quantize(24)
        image.info["transparency"] = 3
        return image
    if mode == "I;16":
        return Image.fromarray(waves.clip(0, 255).astype(np.uint16) * 257)
    return image.convert(mode)


def chats() -> list[tuple[list[Message], bool]]:
    """Chats and whether their images are split; lengths differ, one has no image."""
    return [
        ([_user(sample_image((640, 160), seed=1), "What does it say?")], True),
        (
            [
                _user(
                    sample_image((60, 90), seed=2), "And this one:", sample_image((80, 20), seed=3)
                ),
                {"role": "assistant", "content": [{"type": "text", "text": "A wide one.\n"}]},
                _user("Why?"),
            ],
            False,
        ),
        ([_user("There is nothing written here. How many lines are there?")], False),
    ]


def _user(*parts: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}
