"""What a form costs per token, and what is saved when one picture is asked about several times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from smolstack.bench.timing import OURS, Case, Contender
from smolstack.checkpoint.new import new_checkpoint
from smolstack.family import Preset
from smolstack.generation.options import AnswerOptions
from smolstack.vlm import VLM, load

TOKENS = 48
QUESTIONS = ("What is this?", "What colour is it?", "How many are there?", "Where was it taken?")
FORMS: dict[str, AnswerOptions] = {
    "regex": {"regex": "[a-zA-Z ,.]{400,}"},
    "schema": {"schema": {"type": "object", "additionalProperties": {"type": "string"}}},
}


def structured(preset: Preset, dtype: torch.dtype, seed: int = 0) -> Iterator[Case]:
    """A token of a free answer, and of one that keeps to a form."""
    with _made(preset, dtype, seed) as vlm:
        contenders = [Contender(OURS, partial(_write, vlm, {}))]
        contenders += [
            Contender(f"with a {name}", partial(_write, vlm, form)) for name, form in FORMS.items()
        ]
        yield Case(f"structured, per token, {_label(dtype)}", contenders, units=TOKENS)


def questions(preset: Preset, dtype: torch.dtype, seed: int = 0) -> Iterator[Case]:
    """Four questions about one picture: read once, or anew each time."""
    with _made(preset, dtype, seed) as vlm:
        noise = np.random.default_rng(seed).integers(0, 256, (38, 200, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((1600, 300))
        tiles = vlm.plan(picture).tiles
        yield Case(
            f"{len(QUESTIONS)} questions, one picture of {tiles} tiles, {_label(dtype)}",
            [
                Contender(OURS, partial(_question, vlm, picture, pictures=True, prefix=True)),
                Contender("picture kept alone", partial(_question, vlm, picture, pictures=True)),
                Contender("nothing kept", partial(_question, vlm, picture)),
            ],
        )


def _write(vlm: VLM, form: AnswerOptions) -> None:
    options: AnswerOptions = {"max_new_tokens": TOKENS, "seed": 0, "temperature": 1.0}
    options.update(form)
    answer = vlm.ask(text="Write.", **options)
    assert answer.usage.completion_tokens == TOKENS


def _question(
    vlm: VLM, picture: Image.Image, *, pictures: bool = False, prefix: bool = False
) -> None:
    vlm.forget()
    for question in QUESTIONS:
        vlm.ask(picture, question, max_new_tokens=4)
        if not pictures:
            vlm.picture_cache.clear()
        if not prefix:
            vlm.forget_conversation()


@contextmanager
def _made(preset: Preset, dtype: torch.dtype, seed: int) -> Iterator[VLM]:
    """A checkpoint with random weights that never ends an answer by itself."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        new_checkpoint(preset, path, seed=seed, dtype=_label(dtype))
        vlm = load(path, dtype=_label(dtype))
        vlm.eos_token_ids = ()
        yield vlm


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
