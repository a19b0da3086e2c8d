"""Plans of images, pages and videos for /plan, which the test page shows."""

from __future__ import annotations

import base64
import math
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from smolstack.errors import SmolstackError
from smolstack.processor.formats import SERVED
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import open_image
from smolstack.processor.video import Frame, Video
from smolstack.serve import media, request_options
from smolstack.serve.media import Media
from smolstack.serve.schemas import PlanRequest
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM

_PREVIEW = 1600  # maximum edge of a preview, in pixels
_FRAME = 240  # maximum edge of a video frame in a preview, in pixels


def plan_response(
    vlm: VLM, found: Media | tuple[int, int], body: PlanRequest, settings: ServerSettings
) -> dict[str, Any]:
    """Return the plan of an image, a video or a size as JSON. Slow; call it in a thread."""
    if isinstance(found, tuple):
        return describe_plan(vlm.plan(found, body.text, **request_options.tiling(body)))
    if found.kind == "video":
        return _video(vlm, media.video(found, vlm, settings), body)
    try:
        pages = media.page_count(found)
    except SmolstackError as error:
        raise found.placed(error) from None
    if found.page is None and pages > 1:
        # The first page is planned by default; a chat request must name one.
        found = Media(found.content, found.place, found.kind, 1)
    (image,) = media.images(found, settings)
    plan = vlm.plan(image, body.text, **request_options.tiling(body))
    made = {**describe_plan(plan), "pages": pages}
    if body.preview:
        try:
            shown = open_image(image, settings.image_pixels, SERVED)
        except SmolstackError as error:
            raise found.placed(error) from None
        made["preview"] = _preview(shown)
    return made


def describe_plan(plan: Any) -> dict[str, Any]:
    """Return a plan as JSON."""
    return {
        "source": plan.source,
        "resized": plan.resized,
        "canvas": plan.canvas,
        "rows": plan.rows,
        "cols": plan.cols,
        "tile_edge": plan.tile_edge,
        "tiles": plan.tiles,
        "visual_tokens": plan.visual_tokens,
        "prompt_tokens": plan.prompt_tokens,
        "boxes": plan.source_boxes(),
    }


def _video(vlm: VLM, video: Video, body: PlanRequest) -> dict[str, Any]:
    """Return the plan of a video, whose frames are one tile each."""
    processor: Processor = vlm.processor
    first = processor.plan(Frame(video.frames[0]))
    text = {"type": "text", "text": body.text}
    shown = [{"role": "user", "content": [{"type": "video", "video": video}, text]}]
    prompt = processor.prepare(shown)
    made = {
        **describe_plan(first),
        "tiles": len(video.frames),
        "visual_tokens": sum(plan.visual_tokens for plan in prompt.plans),
        "prompt_tokens": len(prompt.token_ids),
        "boxes": [],
        "frames": len(video.frames),
        "seconds": [round(each, 3) for each in video.seconds],
        "duration": video.duration,
    }
    if body.preview:
        made["preview"] = _preview(_sheet(video))
    return made


def _sheet(video: Video) -> Image.Image:
    """Draw all frames as a contact sheet."""
    frames = [Image.fromarray(np.asarray(frame)) for frame in video.frames]
    for frame in frames:
        frame.thumbnail((_FRAME, _FRAME))
    wide, high = frames[0].size
    cols = math.ceil(math.sqrt(len(frames)))
    sheet = Image.new("RGB", (cols * wide, -(-len(frames) // cols) * high), "white")
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % cols * wide, number // cols * high))
    return sheet


def _preview(image: Image.Image) -> str:
    image.thumbnail((_PREVIEW, _PREVIEW))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
