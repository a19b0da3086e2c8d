"""A video that a stranger sent: which formats are tried, how large it may be, how long it may take.

FFmpeg has formats that name other files and addresses (playlists, lists of files) and decoders of
hundreds of codecs; of what comes from elsewhere only the usual containers and codecs are opened.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from smolstack.errors import VideoError

CONTAINERS = ("mov", "matroska", "webm", "avi", "mpegts", "ogg")
CODECS = (
    *("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "libdav1d", "av1"),
    *("mpeg4", "mpeg1video", "mpeg2video", "h263", "mjpeg", "theora"),
)
_FRAMES = 17  # that a decoder keeps for reference, beside one for each thread
_BESIDE = 12  # bytes per pixel of the frame that is converted and resized
_LONGEST = 366 * 86400  # seconds; a duration above is damage


@dataclass(frozen=True)
class VideoBytes:
    """The bytes of a video file.

    Attributes:
        max_pixels: of a frame.
        until: when it must have been read, on the clock of time.monotonic.
    """

    content: bytes = field(repr=False)
    max_pixels: int
    until: float = float("inf")

    def __str__(self) -> str:
        return f"video of {len(self.content)} bytes"


def opened(source: Path | VideoBytes) -> Any:
    """A container, open for reading.

    Raises:
        av.error.FFmpegError: it cannot be opened.
    """
    import av

    if isinstance(source, Path):
        return av.open(str(source))
    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "codec_whitelist": ",".join(CODECS),
        "protocol_whitelist": "none",  # nothing beside these bytes is opened
        "max_pixels": str(source.max_pixels),
    }
    return av.open(BytesIO(source.content), options=options)


def check_stream(source: Path | VideoBytes, stream: Any) -> None:
    """Hold a stranger's video stream to its limits, before it is decoded.

    Raises:
        VideoError: its frames are too large, or its codec is not decoded for strangers.
    """
    if isinstance(source, Path):
        return
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{source} has an unknown codec")
    if context.width * context.height > source.max_pixels:
        raise VideoError(
            f"{source} has frames of {context.width}x{context.height} pixels, more than the "
            f"{source.max_pixels:,} that are decoded"
        )
    if context.name not in CODECS:
        raise VideoError(f"{source} has the codec {context.name}, expected one of {CODECS}")
    context.options = {
        "codec_whitelist": ",".join(CODECS),
        "max_pixels": str(source.max_pixels),
    }
    context.thread_count = 2


def decoding_bytes(stream: Any) -> int:
    """Peak bytes of decoding a stream and converting one frame at a time, estimated."""
    context = stream.codec_context
    form = getattr(context, "format", None)
    bits = max(12, form.padded_bits_per_pixel if form is not None else 24)
    threads = context.thread_count or 16
    each = (_FRAMES + threads) * bits / 8 + _BESIDE
    return int(context.width * context.height * each)


def check_time(source: Path | VideoBytes) -> None:
    """Give a stranger's video up once it has taken too long.

    Raises:
        VideoError: it has.
    """
    if isinstance(source, VideoBytes) and time.monotonic() > source.until:
        raise VideoError(f"{source} takes too long to decode; send a shorter or smaller one")


def check_length(source: Path | VideoBytes, seconds: float) -> None:
    """Refuse a duration that no video has.

    Raises:
        VideoError: naming it.
    """
    if not 0 <= seconds <= _LONGEST:
        raise VideoError(f"{source} declares a duration of {seconds:g} s, expected at most a year")
