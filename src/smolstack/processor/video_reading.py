"""Read sampled frames of video files with PyAV."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolstack.errors import ImageError, VideoError
from smolstack.processor.animation import is_animation, read_animation
from smolstack.processor.decoding_memory import MEMORY
from smolstack.processor.tiles import MAX_PIXELS
from smolstack.processor.video import Video, VideoSettings
from smolstack.processor.video_bytes import (
    CONTAINERS,
    VideoBytes,
    check_length,
    check_stream,
    check_time,
    decoding_bytes,
    opened,
)
from smolstack.processor.video_length import counted_length, declared_length

SKIPPED = 1.0  # seconds skipped at both ends of a long video
SEEK = 8.0  # seconds to the next wanted frame beyond which the frames between are not decoded

Frames = npt.NDArray[np.uint8]


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
        path: a file of any format that FFmpeg reads; or an untrusted file, read within limits.
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
        return _read_untrusted(path, fps, max_frames, shrink)
    path = Path(path)
    if not path.is_file():
        there = "a pipe or device" if path.exists() else "missing"
        found = "a folder" if path.is_dir() else there
        raise VideoError(f"{path} is {found}, expected a video file")
    if is_animation(path):

        def choose(total: int, rate: float) -> list[int]:
            return pick_frames(total, rate, fps, max_frames)

        return Video(*read_animation(path, MAX_PIXELS, choose, shrink))
    return _open(path, fps, max_frames, shrink)


def _read_untrusted(
    source: VideoBytes, fps: float, max_frames: int, shrink: Callable[[Frames], Frames] | None
) -> Video:
    """Read an untrusted file. All errors become a VideoError without the traceback, which would
    keep the decoder and its frames in memory."""
    try:
        return _open(source, fps, max_frames, shrink)
    except VideoError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{source} cannot be read as a video: {type(error).__name__}: {error}"
    raise VideoError(reason)


def _open(
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
        accepted = "" if isinstance(path, Path) else f"; accepted are {', '.join(CONTAINERS)}"
        raise VideoError(f"{path} cannot be read as a video: {error}{accepted}") from error
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
            raise VideoError(f"{path} has no video stream")
        stream = container.streams.video[0]
        check_stream(path, stream)
        checked = partial(check_time, path)
        measures = counted_length(container, checked) if count else declared_length(container)
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
