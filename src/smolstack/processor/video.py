"""Videos: their settings, their frames, and the prompt text that gives the frames' times.

A video becomes text and images: the number of frames and the duration, then each frame as one tile
after its timestamp, with the wording of transformers' SmolVLM2 processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from smolstack.batch import VisualTokens
from smolstack.errors import ConfigError, VideoError
from smolstack.processor.formats import VIDEO_SUFFIXES
from smolstack.processor.tiles import ImageSource

RESIZES = ("video_size", "size")


@dataclass(frozen=True)
class VideoSettings:
    """Video settings of a checkpoint.

    Attributes:
        fps: maximum frames per second.
        max_frames: maximum number of frames; frames of longer videos are further apart.
        longest_edge: pixels of a frame's longer side by ``video_size``.
        image_edge: pixels of an image's longer side (``size``), if the same file gives both.
        resize: which of them a frame is resized to first, "video_size" or "size"; see
            :meth:`resized_by`.
    """

    fps: float = 1.0
    max_frames: int = 64
    longest_edge: int | None = None
    image_edge: int | None = None
    resize: str = "video_size"

    @classmethod
    def from_hf(cls, *places: Mapping[str, Any]) -> VideoSettings:
        """Read the settings from the first object that has them.

        Either ``video_sampling`` in preprocessor_config.json, or the keys of
        video_preprocessor_config.json.
        """
        found: dict[str, Any] = {}
        for place in places:
            sampling = place.get("video_sampling") or {}
            told = {
                "fps": sampling.get("fps", place.get("fps")),
                "max_frames": sampling.get("max_frames", place.get("num_frames")),
                "longest_edge": (sampling.get("video_size") or {}).get("longest_edge"),
                "image_edge": (place.get("size") or {}).get("longest_edge") if sampling else None,
            }
            found = {key: value for key, value in told.items() if value is not None} | found
        return cls(**found)

    def resized_by(self, key: str) -> VideoSettings:
        """Return settings that resize frames to another edge first, and then to a tile.

        Args:
            key: "video_size" (``video_sampling.video_size``, the default, as in transformers 4.50)
                or "size" (the images' own ``size``, as in transformers 5, which overwrites the
                other by it).

        Raises:
            ConfigError: another key; or "size", and the checkpoint has no ``video_sampling``
                beside a ``size``.
        """
        if key == "size" and self.image_edge is None:
            raise ConfigError(
                "frames of videos cannot be resized by size: the checkpoint's image processor has "
                "no video_sampling beside a size"
            )
        return replace(self, resize=key)

    @property
    def first_edge(self) -> int | None:
        """Pixels that a frame's longer side is resized to first; None: those of a tile."""
        return self.image_edge if self.resize == "size" else self.longest_edge

    def __post_init__(self) -> None:
        limits = (("fps", 0), ("max_frames", 1), ("longest_edge", 1), ("image_edge", 1))
        for name, lowest in limits:
            value = getattr(self, name)
            if name.endswith("_edge") and value is None:
                continue
            kinds = (int, float) if name == "fps" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < lowest:
                raise ConfigError(
                    f"{name} of videos is {value!r:.40}, expected a number of at least {lowest}"
                )
        if self.fps == 0:
            raise ConfigError("fps of videos is 0, expected a positive number")
        if self.resize not in RESIZES:
            raise ConfigError(
                f"resize of videos is {self.resize!r:.40}, expected one of {list(RESIZES)}"
            )


@dataclass(frozen=True)
class Video:
    """Frames of a video, in order.

    Attributes:
        frames: images, or their visual tokens.
        seconds: the time of each frame.
        duration: of the whole video, in seconds.
    """

    frames: Sequence[ImageSource | VisualTokens]
    seconds: Sequence[float]
    duration: float

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.seconds):
            raise VideoError(
                f"a video has {len(self.frames)} frames and {len(self.seconds)} times, expected "
                "a time for each frame, and at least one frame"
            )
        if min(self.seconds) < 0 or self.duration < 0:
            raise VideoError(
                "a video has negative frame times, expected seconds from its beginning"
            )

    def parts(self) -> list[dict[str, str]]:
        """Return the message parts of the video: text, and an image for each frame."""
        count, whole = number_in_words(len(self.frames)), timedelta(seconds=int(self.duration))
        text = (
            f"You are provided the following series of {count} frames from a {whole} "
            "[H:MM:SS] video.\n"
        )
        parts = []
        for seconds in self.seconds:
            minute, second = divmod(int(seconds), 60)
            text += f"\nFrame from {minute:02d}:{second:02d}:"
            parts += [{"type": "text", "text": text}, {"type": "image"}]
            text = ""
        return [*parts, {"type": "text", "text": "\n\n"}]


@dataclass(frozen=True)
class Frame:
    """A video frame: an image that is always one tile."""

    image: ImageSource | VisualTokens


def is_video(source: object) -> bool:
    """Whether the value is a Video or a path with a video suffix."""
    if isinstance(source, (str, Path)):
        return Path(source).suffix.lower() in VIDEO_SUFFIXES
    return isinstance(source, Video)


def number_in_words(number: int) -> str:
    """Spell a number in English words."""
    try:
        from num2words import num2words
    except ImportError:
        raise VideoError(
            "videos need the packages av and num2words (pip install 'smolstack[video]')"
        ) from None
    return str(num2words(number))
