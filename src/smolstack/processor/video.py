"""Videos: sample frames and write the prompt text that gives their times.

A video becomes text and images: the number of frames and the duration, then each frame as one tile
after its timestamp, with the wording of transformers' SmolVLM2 processor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolstack.batch import VisualTokens
from smolstack.errors import ConfigError, ImageError, VideoError
from smolstack.processor.animation import is_animation, read_animation
from smolstack.processor.decoding_memory import MEMORY
from smolstack.processor.tiles import MAX_PIXELS, ImageSource
from smolstack.processor.video_bytes import (
    VideoBytes,
    check_length,
    check_stream,
    check_time,
    decoding_bytes,
    opened,
)
from smolstack.processor.video_length import counted_measures, told_measures

# Suffixes treated as videos wherever a path is accepted; listed in docs/videos.md.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mj2", ".ismv"),
    *(".mkv", ".mk3d", ".webm", ".ogv", ".ogm", ".nut"),
    *(".avi", ".divx", ".wmv", ".asf", ".flv", ".rm", ".rmvb", ".dv", ".mxf", ".gxf", ".wtv"),
    *(".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t"),
    *(".h264", ".264", ".h265", ".265", ".hevc", ".ivf", ".obu", ".mjpg", ".mjpeg", ".y4m"),
)
RESIZES = ("video_size", "size")
SKIPPED = 1.0  # seconds skipped at both ends of a long video
SEEK = 8.0  # seconds to the next wanted frame beyond which the frames between are not decoded

Frames = npt.NDArray[np.uint8]


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
            raise ConfigError("fps of videos is 0, expected more")
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
                "one time for each, and one frame at least"
            )
        if min(self.seconds) < 0 or self.duration < 0:
            raise VideoError("a video has times before its beginning, expected seconds from it")

    def parts(self) -> list[dict[str, str]]:
        """Return the message parts of the video: text, and an image for each frame."""
        count, whole = spelled(len(self.frames)), timedelta(seconds=int(self.duration))
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
        return Path(source).suffix.lower() in SUFFIXES
    return isinstance(source, Video)


def spelled(number: int) -> str:
    """Spell a number in English words."""
    try:
        from num2words import num2words
    except ImportError:
        raise VideoError(
            "videos need the packages av and num2words (pip install 'smolstack[video]')"
        ) from None
    return str(num2words(number))


def pick_frames(total: int, rate: float, fps: float, most: int) -> list[int]:
    """Indices of the frames to sample, of ``total`` at ``rate`` per second.

    About ``fps`` per second and at most ``most``, evenly spaced from the first to the last. As in
    transformers' SmolVLM processor, a second at both ends is skipped if the rest of the video is
    longer than ``most · fps`` seconds.
    """
    duration = total / rate
    wanted = max(1, min(round(fps * duration), most))
    first, last = 0, total - 1
    if duration - 2 * SKIPPED > most * fps:
        first, last = int(SKIPPED * rate), min(int(total - SKIPPED * rate), total - 1)
        if first >= last:
            first, last = 0, total - 1
    return sorted({int(place) for place in np.linspace(first, last, wanted, dtype=int)})


def read_video(
    path: str | Path | VideoBytes,
    *,
    fps: float = 1.0,
    max_frames: int = 64,
    shrink: Callable[[Frames], Frames] | None = None,
) -> Video:
    """Read sampled frames of a video file, upright.

    Args:
        path: of any format that FFmpeg reads; or a stranger's file, which is held to limits.
        fps: maximum frames per second.
        max_frames: maximum number of frames.
        shrink: applied to each frame (H, W, 3) as it is decoded, to save memory.

    Raises:
        VideoError: PyAV is not installed; the file is missing, damaged, not a video, or empty.
        ConfigError: fps or max_frames is invalid.
    """
    VideoSettings(fps, max_frames)
    try:
        import av  # noqa: F401
    except ImportError:
        raise VideoError(
            "videos need the packages av and num2words (pip install 'smolstack[video]')"
        ) from None
    if isinstance(path, VideoBytes):
        return _of_stranger(path, fps, max_frames, shrink)
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path} is {'a folder' if path.exists() else 'not there'}, expected a "
                         "video file")  # fmt: skip
    if is_animation(path):

        def choose(total: int, rate: float) -> list[int]:
            return pick_frames(total, rate, fps, max_frames)

        return Video(*read_animation(path, MAX_PIXELS, choose, shrink))
    return _opened_or_counted(path, fps, max_frames, shrink)


def _of_stranger(
    source: VideoBytes, fps: float, max_frames: int, shrink: Callable[[Frames], Frames] | None
) -> Video:
    """The same of bytes: whatever FFmpeg makes of them is a VideoError, without its traceback,
    which would keep the decoder and its frames."""
    try:
        return _opened_or_counted(source, fps, max_frames, shrink)
    except VideoError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{source} cannot be read as a video: {type(error).__name__}: {error}"
    raise VideoError(reason)


def _opened_or_counted(
    path: Path | VideoBytes,
    fps: float,
    max_frames: int,
    shrink: Callable[[Frames], Frames] | None,
) -> Video:
    import av

    try:
        made = _read(path, fps, max_frames, shrink, count=False)
        if made is None:
            made = _read(path, fps, max_frames, shrink, count=True)
    except (av.error.FFmpegError, ImageError) as error:
        raise VideoError(f"{path} cannot be read as a video: {error}") from error
    if made is None:
        raise VideoError(f"{path} has no frame that can be decoded")
    return made


def _read(
    path: Path | VideoBytes,
    fps: float,
    max_frames: int,
    shrink: Callable[[Frames], Frames] | None,
    *,
    count: bool,
) -> Video | None:
    """Read sampled frames; None if the file gives no frame count, or has fewer frames than that.

    Args:
        count: count the frames by reading the file once more; the frames found are then used,
            and None means that there were none.
    """
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(opened(path))
        if not container.streams.video:
            raise VideoError(f"{path} has no video, expected some frames")
        stream = container.streams.video[0]
        check_stream(path, stream)
        checked = partial(check_time, path)
        measures = counted_measures(container, checked) if count else told_measures(container)
        if measures is None:
            return None
        if measures.again:
            container = stack.enter_context(opened(path))
            check_stream(path, container.streams.video[0])
        check_length(path, measures.total / measures.rate)
        stack.enter_context(MEMORY.hold(decoding_bytes(stream), str(path)))
        rate = measures.rate
        places = pick_frames(measures.total, rate, fps, max_frames)
        times = [place / rate for place in places]
        # One at a time: sixty full frames of a large video take hundreds of megabytes.
        found = [
            (seconds, pixels if shrink is None else shrink(pixels))
            for seconds, pixels in _decoded(
                container, times, 0.5 / rate, seeks=measures.seeks, check=checked
            )
        ]
    if not found or (len(found) < len(places) and not count):
        return None
    return Video(
        [pixels for _, pixels in found], [seconds for seconds, _ in found], measures.total / rate
    )


def _decoded(
    container: Any, wanted: Sequence[float], near: float, *, seeks: bool, check: Callable[[], None]
) -> Iterator[tuple[float, Frames]]:
    """Return (seconds, pixels) of the frames at the given times, or the next frame after each.

    Args:
        wanted: seconds from the first frame, ascending.
        near: tolerance in seconds for a frame that is too early.
        seeks: whether frames between may be skipped by seeking.
        check: called before every frame; may raise.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    start = float((stream.start_time or 0) * stream.time_base)
    rest = list(wanted)
    frames = container.decode(stream)
    seconds = -2 * near
    while rest:
        check()
        frame = next(frames, None)
        if frame is None:
            return
        # A frame without a timestamp is assumed to follow the previous one.
        seconds = seconds + 2 * near if frame.time is None else float(frame.time) - start
        if seconds >= rest[0] - near:
            yield max(0.0, seconds), _upright(frame)
            rest = [other for other in rest if other - near > seconds]
            if seeks and rest and rest[0] - seconds > SEEK:
                place = int((rest[0] + start) / stream.time_base)
                container.seek(place, stream=stream, backward=True)
                frames = container.decode(stream)


def _upright(frame: Any) -> Frames:
    """Pixels (H, W, 3) of a frame, rotated as the file specifies (as phone videos do)."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ImageError(f"a frame has {frame.width}x{frame.height} pixels, more than {MAX_PIXELS}")
    pixels: Frames = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns))
