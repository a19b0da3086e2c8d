"""How commands prepare the frames of videos."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from smolstack.vlm import VLM


class Resize(str, Enum):
    """Keys of preprocessor_config.json that a frame's first size may be taken from."""

    video_size = "video_size"
    size = "size"


ResizeOption = Annotated[
    Resize,
    typer.Option(
        "--video-resize",
        help="What a video's frame is resized to before it becomes a tile: the checkpoint's "
        "video_size, or its size, as transformers 5 does.",
        rich_help_panel="Images",
    ),
]


def set_resize(vlm: VLM, chosen: Resize) -> None:
    """Let a model see videos as the option says."""
    videos = vlm.processor.videos
    vlm.processor.videos = videos.resized_by(chosen.value)
