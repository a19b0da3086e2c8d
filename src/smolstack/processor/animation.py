"""Read animated GIF, WebP, AVIF and PNG files as videos: frames and their times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smolstack.errors import ImageError, VideoError
from smolstack.processor.decoding import animation

Frames = npt.NDArray[np.uint8]
SUFFIXES = (".gif", ".webp", ".avif", ".png", ".apng")
FORMATS = ("GIF", "WEBP", "AVIF", "PNG")
_NOT_SAID = 0.1  # seconds of a frame without a duration, as in browsers


def is_animation(source: object) -> bool:
    """Whether a path has the suffix of a format that may be animated."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() in SUFFIXES


def read_animation(
    path: Path,
    max_pixels: int,
    choose: Callable[[int, float], list[int]],
    shrink: Callable[[Frames], Frames] | None,
) -> tuple[list[Frames], list[float], float]:
    """Return (frames, their seconds, duration) of an animation.

    Args:
        max_pixels: maximum pixels of a frame.
        choose: picks frame indices, given the number of frames and the frame rate.
        shrink: applied to each frame (H, W, 3).

    Raises:
        VideoError: it cannot be read, or has only one frame.
    """
    starts, now = [], 0.0
    try:
        for _, seconds in animation(path, max_pixels, FORMATS, None):
            starts.append(now)
            now += seconds or _NOT_SAID
        if len(starts) < 2:
            raise VideoError(f"{path} has one frame, expected a video")
        wanted = choose(len(starts), len(starts) / now)
        frames = []
        for image, _ in animation(path, max_pixels, FORMATS, frozenset(wanted)):
            if image is not None:
                pixels = np.asarray(image)
                frames.append(pixels.copy() if shrink is None else shrink(pixels))
    except ImageError as error:
        raise VideoError(str(error)) from None
    return frames, [starts[number] for number in wanted], now
