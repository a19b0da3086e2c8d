"""Duration and frame count of a video, from its metadata or by counting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# FFmpeg's names of formats that store their duration; for others it is estimated from the file size
# or the first frames.
_TELLS = ("matroska", "mov", "mpegts", "mpeg")
_AGREES = 2  # tolerated error of the mean frame rate, in frames


@dataclass(frozen=True)
class VideoLength:
    """Frame rate and length of a video.

    Attributes:
        rate: frames per second.
        total: frames.
        seeks: whether seeking to a time is possible.
        again: whether the file was read to its end and has to be reopened.
    """

    rate: float
    total: int
    seeks: bool = True
    again: bool = False


def declared_length(container: Any) -> VideoLength | None:
    """VideoLength from the file's metadata; None if it lacks them."""
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    seconds = 0.0
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / 1e6
    if stream.frames > 0:
        if not rate:
            rate = stream.frames / seconds if seconds > 0 else 24.0
        return VideoLength(rate, stream.frames)
    tells = container.format.name.split(",")[0] in _TELLS
    if not tells or not rate or seconds <= 0 or round(seconds * rate) < 1:
        return None
    return VideoLength(rate, round(seconds * rate))


def counted_length(container: Any, check: Callable[[], None]) -> VideoLength:
    """VideoLength from counting packets: the file is read to its end but not decoded.

    ``check`` is called before every packet and may raise.
    """
    stream = container.streams.video[0]
    told = float(stream.average_rate or stream.guessed_rate or 0)
    total, first, last = 0, None, None
    for packet in container.demux(stream):
        check()
        if not packet.size:
            continue
        total += 1
        time = packet.dts if packet.pts is None else packet.pts
        if time is None:
            continue
        first = time if first is None else min(first, time)
        end = time + (packet.duration or 0)
        last = end if last is None else max(last, end)
    seconds = 0.0
    if first is not None and last is not None and stream.time_base is not None:
        seconds = float((last - first) * stream.time_base)
    rate = told or 24.0
    if seconds > 0 and abs(total - seconds * rate) > _AGREES:
        rate = total / seconds  # frames that are not evenly spaced, or an estimated rate
    # Some formats store keyframe positions; for another family they are known after reading it.
    kind = container.format.name.split(",")[0]
    seeks = kind == "mov" or (kind == "matroska" and _rewound(container))
    return VideoLength(rate, max(1, total), seeks, again=kind != "matroska" or not seeks)


def _rewound(container: Any) -> bool:
    """Whether a file that was read to its end could be rewound."""
    import av

    stream = container.streams.video[0]
    try:
        container.seek(stream.start_time or 0, stream=stream, backward=True)
    except av.error.FFmpegError:
        return False
    return True
