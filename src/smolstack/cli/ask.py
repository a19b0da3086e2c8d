"""``smolstack ask``: a question about images, with a streamed answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolstack.cli import answer_options, file_options, model_options, options, video_options
from smolstack.cli.console import note, progress, show_json, write_piece
from smolstack.cli.model_loading import load_model
from smolstack.errors import ImageError, PromptError
from smolstack.text import plural

if TYPE_CHECKING:
    from smolstack.generation.answer import Answer
    from smolstack.processor.geometry import TilePlan
    from smolstack.processor.inputs import ImageOptions, MediaInput
    from smolstack.processor.video import Video
    from smolstack.vlm import VLM

EXAMPLES = """
**Examples**

`smolstack ask sign.png "What does it say?"`

`smolstack ask before.png after.png "What has changed?" --verbose`

`curl -s https://example.org/cat.jpg | smolstack ask - "What is this?"`

`smolstack ask receipt.png "The total?" --regex '[0-9]+\\.[0-9]{2}'`

`smolstack ask photo.png "Is it day or night?" --choice day --choice night --verbose`

`smolstack ask clip.mp4 "What happens?" --model HuggingFaceTB/SmolVLM2-256M-Video-Instruct`

`smolstack ask page.png "Read this page." --model HuggingFaceTB/SmolVLM-256M-Instruct --json`
"""
STDIN = "-"


def ask(
    *,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE...",
            help="Image and video files in order; - reads an image from stdin.",
        ),
    ] = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    image_cache: options.ImageCacheFolder = None,
    split: options.SplitOption = None,
    max_image_tokens: options.MaxImageTokens = None,
    upscale: options.Upscale = True,
    password: file_options.Password = None,
    fps: options.Fps = None,
    max_frames: options.MaxFrames = None,
    video_resize: video_options.ResizeOption = video_options.Resize.video_size,
    max_new_tokens: options.MaxNewTokens = 512,
    stop: options.Stop = None,
    stop_on_repetition: options.StopOnRepetition = False,
    keep_special_tokens: options.KeepSpecialTokens = False,
    special_tokens_in_text: options.SpecialTokensInText = True,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    schema: options.SchemaOption = None,
    regex: options.RegexOption = None,
    choice: options.ChoiceOption = None,
    json: options.JsonOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Ask a question about one or more images; the answer is streamed to stdout."""
    names = images or []
    check_question(names, question)
    sources = [read_image(name) for name in names]
    chosen = answer_options.generation_options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        stop_on_repetition=stop_on_repetition,
        keep_special_tokens=keep_special_tokens,
        split=split,
        max_image_tokens=max_image_tokens,
        upscale=upscale,
        password=password,
    )
    chosen.update(answer_options.form_options(schema, regex, choice))
    vlm = load_model(
        model,
        revision,
        dtype,
        device,
        threads,
        base=base,
        mmproj=mmproj,
        images=image_cache,
    )
    vlm.processor.special_tokens_in_text = special_tokens_in_text
    video_options.set_resize(vlm, video_resize)
    image_options = answer_options.image_options(chosen)
    shown = [_opened(vlm, image, fps, max_frames) for image in sources]
    plans = [_plans(vlm, image, image_options) for image in shown]
    if verbose:
        note(vlm.precision)
        for name, image, planned in zip(names, shown, plans, strict=True):
            note(_line(name, image, planned))
    with progress(_reading(plans)):
        stream = vlm.stream(shown, question, **chosen)
        first = next(stream, "")
    if not json:
        write_piece(first)
    for piece in stream:
        if not json:
            write_piece(piece)
    answer = stream.answer
    if json:
        seen = zip(names, shown, plans, strict=True)
        show_json(answer_json(answer, [_seen_json(*one) for one in seen]))
    else:
        write_piece("\n")
    tell_ending(answer, verbose=verbose)


def check_question(images: list[str], text: str) -> None:
    """Raise an error if the question is an image: the question was forgotten."""
    if text == STDIN or (text and _is_file(text)):
        raise PromptError(
            f"no question was given: the last argument, {text}, is an image; put the question "
            "after it"
        )
    if images.count(STDIN) > 1:
        raise ImageError(f"- is given {images.count(STDIN)} times, but stdin contains one image")


def read_image(image: str) -> str | bytes:
    """Return an image in the library's form: a path, or the bytes from stdin."""
    if image != STDIN:
        return image
    if sys.stdin.isatty():
        raise ImageError(
            "- reads an image from stdin, but stdin is a terminal; pipe an image to it"
        )
    content = sys.stdin.buffer.read()
    if not content:
        raise ImageError("stdin is empty (0 bytes), expected an image")
    return content


def answer_json(answer: Answer, images: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an answer as plain data, with the plans of its images and videos."""
    data = answer.to_dict()
    return {
        "text": data["text"],
        "finish_reason": data["finish_reason"],
        "usage": data["usage"],
        **({"probabilities": data["probabilities"]} if data["probabilities"] else {}),
        "timings": {
            **data["timings"],
            "total": answer.timings.total,
            "tokens_per_second": answer.timings.tokens_per_second,
        },
        "images": images,
    }


def plan_json(name: str, plan: TilePlan) -> dict[str, Any]:
    """Return a tile plan as plain data; sizes are [width, height] in pixels."""
    return {
        "image": name,
        "source": list(plan.source),
        "resized": list(plan.resized),
        "canvas": list(plan.canvas),
        "rows": plan.rows,
        "cols": plan.cols,
        "tile_edge": plan.tile_edge,
        "tiles": plan.tiles,
        "visual_tokens": plan.visual_tokens,
        "pixels_read": plan.pixels_read,
    }


def _seen_json(name: str, shown: MediaInput, plans: list[TilePlan]) -> dict[str, Any]:
    from smolstack.processor.video import Video

    if not isinstance(shown, Video):
        return plan_json(name, plans[0])
    return {
        "video": name,
        "duration": shown.duration,
        "seconds": list(shown.seconds),
        "tiles": sum(plan.tiles for plan in plans),
        "visual_tokens": sum(plan.visual_tokens for plan in plans),
    }


def plan_line(name: str, plan: TilePlan) -> str:
    """Describe a tile plan in one line."""
    made = f"{grid(plan)} + the whole" if plan.rows else "the whole"
    return (
        f"{name}: {size(plan.source)} → {size(plan.canvas)}, {made} = "
        f"{plural(plan.tiles, 'tile')} of {plan.tile_edge}x{plan.tile_edge}, "
        f"{plural(plan.visual_tokens, 'visual token')}"
    )


def video_line(name: str, video: Video, plans: list[TilePlan]) -> str:
    """Describe the frames read from a video in one line."""
    tokens = sum(plan.visual_tokens for plan in plans)
    return (
        f"{name}: {plural(len(plans), 'frame')} of {video.duration:.1f} s, one tile of "
        f"{plans[0].tile_edge}x{plans[0].tile_edge} each, {plural(tokens, 'visual token')}"
    )


def tell_ending(answer: Answer, *, verbose: bool) -> None:
    """Print an answer's finish reason and timings on stderr; on a terminal, always report a
    cut-off answer.
    """
    if verbose and answer.probabilities is not None:
        for text, share in sorted(answer.probabilities.items(), key=lambda item: -item[1]):
            note(f"{share:8.2%}  {text}")
    if verbose or (sys.stderr.isatty() and answer.finish_reason != "stop"):
        note(ending_line(answer))
    if verbose:
        note(timings_line(answer))


def ending_line(answer: Answer) -> str:
    """Describe an answer's finish reason in one line."""
    tokens = plural(answer.usage.completion_tokens, "token")
    reasons = {
        "stop": f"the answer is complete ({tokens})",
        "length": f"the answer was cut off after {tokens} (--max-new-tokens, or the context)",
        "repetition": f"the answer went round in circles and was ended after {tokens}",
    }
    return reasons[answer.finish_reason]


def timings_line(answer: Answer) -> str:
    """Describe an answer's timings in one line."""
    took, usage = answer.timings, answer.usage
    rate = f" ({took.tokens_per_second:.0f} tokens/s)" if took.decode_steps else ""
    return (
        f"{took.total:.2f} s: images {took.images:.2f}, vision {took.vision:.2f}, "
        f"{plural(usage.prompt_tokens, 'prompt token')} {took.prefill:.2f}, "
        f"answer {took.decode:.2f}{rate}"
    )


def size(pixels: tuple[int, int]) -> str:
    """Format (width, height) as one word."""
    return f"{pixels[0]}x{pixels[1]}"


def grid(plan: TilePlan) -> str:
    """Format rows and columns of tiles as one word."""
    return f"{plan.rows}x{plan.cols} grid"


def _opened(vlm: VLM, image: str | bytes, fps: float | None, most: int | None) -> MediaInput:
    from smolstack.processor.animation import is_animation
    from smolstack.processor.video import is_video

    # An animation is an image unless options for videos are given.
    moving = is_animation(image) and (fps is not None or most is not None)
    if isinstance(image, bytes) or not (is_video(image) or moving):
        return image
    with progress(f"Opening {image} …"):
        return vlm.open_video(image, fps=fps, max_frames=most)


def _plans(vlm: VLM, shown: MediaInput, image_options: ImageOptions) -> list[TilePlan]:
    from smolstack.processor.video import Frame, Video

    if isinstance(shown, Video):
        return [vlm.processor.plan(Frame(frame)) for frame in shown.frames]
    return [vlm.processor.plan(shown, **image_options)]


def _line(name: str, shown: MediaInput, plans: list[TilePlan]) -> str:
    from smolstack.processor.video import Video

    if isinstance(shown, Video):
        return video_line(name, shown, plans)
    return plan_line(name, plans[0])


def _reading(plans: list[list[TilePlan]]) -> str:
    tiles = sum(plan.tiles for planned in plans for plan in planned)
    if not plans:
        return "Reading the question …"
    images = sum(map(len, plans))
    return f"Reading {plural(images, 'image')} ({plural(tiles, 'tile')}) …"


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # the name is too long, or contains a null byte
        return False
