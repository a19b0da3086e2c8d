"""Command line options as options of :meth:`smolstack.VLM.stream`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolstack.errors import PromptError
from smolstack.unique_keys import RepeatedKeyError, read_unique

if TYPE_CHECKING:
    from smolstack.generation.options import AnswerOptions
    from smolstack.processor.inputs import ImageOptions


def form_options(
    schema: Path | None, regex: str | None, choices: list[str] | None
) -> AnswerOptions:
    """Return the ``VLM.stream`` options for structured output."""
    chosen: AnswerOptions = {}
    if schema is not None:
        chosen["schema"] = _read_schema(schema)
    if regex is not None:
        chosen["regex"] = regex
    if choices:
        chosen["choices"] = choices
    return chosen


def _read_schema(path: Path) -> Any:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return read_unique(text)
    except RepeatedKeyError as error:
        raise PromptError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not valid JSON: {error}") from None


def generation_options(
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
    stop_on_repetition: bool,
    keep_special_tokens: bool,
    split: bool | None,
    max_image_tokens: int | None,
    upscale: bool,
    password: str | None = None,
) -> AnswerOptions:
    """Convert command line options to ``VLM.stream`` options."""
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or [],
        "stop_on_repetition": stop_on_repetition,
        "keep_special_tokens": keep_special_tokens,
        "split": split,
        "max_image_tokens": max_image_tokens,
        "upscale": upscale,
        "password": password,
    }


def image_options(chosen: AnswerOptions) -> ImageOptions:
    """Return the options about opening and tiling images."""
    names = ("split", "max_image_tokens", "upscale", "password")
    return {name: chosen.get(name) for name in names}  # type: ignore[return-value]
