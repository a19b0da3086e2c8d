"""Notebook representations of plans, answers, streams and visual tokens.

Shapes: n tiles of an image, S visual tokens per tile, D the text hidden size.
"""

from __future__ import annotations

import io
import math
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.generation.answer import Answer
from smolstack.generation.inline import AnswerStream
from smolstack.processor.geometry import TilePlan
from smolstack.processor.plan_drawing import draw_plan

_SIDE = 160  # pixels per tile edge in the drawing of visual tokens
_GAP = 4


def plan_png(plan: TilePlan) -> bytes:
    """Draw the tiles over the image, or over a pattern if only its size is known."""
    shown = plan.source if plan.image is None else plan.image
    name = shown if isinstance(shown, str) else "image"
    return _png(draw_plan(shown, plan, name))


def visual_tokens_png(visual: VisualTokens) -> bytes:
    """Draw every visual token as a square colored by its first three principal components.

    Neighbors of the same color are similar to the language model. The global tile is last.
    """
    tokens = visual.tokens.detach().float().cpu()
    tiles, per_tile, _ = tokens.shape
    side = math.isqrt(per_tile)
    colours = _principal_colours(tokens).view(tiles, side, side, 3)
    cols = max(visual.cols, 1)
    rows = max(visual.rows, 1)
    step = _SIDE + _GAP
    width = cols * step + (step if visual.rows else 0)
    drawing = Image.new("RGB", (width, rows * step), "white")
    for index, tile in enumerate(colours):
        square = Image.fromarray(tile.numpy()).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        row, col = divmod(index, cols)
        last = visual.rows and index == tiles - 1
        place = (cols * step, 0) if last else (col * step, row * step)
        drawing.paste(square, place)
    return _png(drawing)


def _principal_colours(tokens: Tensor) -> Tensor:
    """(n, S, D) → (n · S, 3) uint8: each component from its 2nd to its 98th percentile."""
    flat = tokens.flatten(0, 1).double()
    flat = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(flat.t() @ flat)
    parts = flat @ vectors[:, -3:].flip(1)
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98], dtype=parts.dtype), dim=0)
    scaled = (parts - low) / (high - low).clamp(min=1e-12)
    colours: Tensor = (scaled.clamp(0, 1) * 255).round().to(torch.uint8)
    return colours


def answer_html(answer: Answer) -> str:
    """Return the text, the finish reason and the usage; for choices, the probability of each."""
    used, took = answer.usage, answer.timings
    facts = (
        f"{used.tiles} tiles · {used.prompt_tokens:,} prompt tokens, {used.visual_tokens:,} of "
        f"them visual · {used.completion_tokens:,} new tokens · ended by "
        f"{escape(answer.finish_reason)}"
    )
    times = (
        f"{took.total:.2f} s: images {took.images:.2f}, vision {took.vision:.2f}, prefill "
        f"{took.prefill:.2f}, decoding {took.decode:.2f} ({took.tokens_per_second:.0f} tokens/s)"
    )
    rows = ""
    for choice, share in (answer.probabilities or {}).items():
        rows += (
            f"<tr><td>{escape(choice)}</td><td><progress value='{share:.4f}'></progress> "
            f"{share:.1%}</td></tr>"
        )
    choices = f"<table>{rows}</table>" if rows else ""
    return (
        f"<div style='white-space:pre-wrap;font-size:1.1em'>{escape(answer.text)}</div>{choices}"
        f"<div style='opacity:.65;font-size:.85em'>{facts}<br>{times}</div>"
    )


def show_stream(stream: AnswerStream) -> None:
    """Display the answer in place while it streams, then the complete answer."""
    from IPython import display as module  # untyped

    ipython: Any = module
    html = ipython.HTML

    handle: Any = ipython.display(html(""), display_id=True)
    text = ""
    for piece in stream:
        text += piece
        handle.update(html(f"<div style='white-space:pre-wrap'>{escape(text)}▌</div>"))
    handle.update(html(answer_html(stream.answer)))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()
