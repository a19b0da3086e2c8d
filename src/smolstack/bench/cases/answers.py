"""Cost per token of structured output, and time saved with several questions about one image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from PIL import Image

from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import OURS, Case, Contender
from smolstack.bench.workload import Workload, noise_image
from smolstack.generation.options import AnswerOptions
from smolstack.vlm import VLM, load

TOKENS = 48
QUESTIONS = ("What is this?", "What colour is it?", "How many are there?", "Where was it taken?")
WIDE = (1600, 300)
# More characters than TOKENS tokens have: whatever is drawn, no answer can end before.
LEAST = 2000
FORMS: dict[str, AnswerOptions] = {
    "regex": {"regex": f"[a-zA-Z ,.]{{{LEAST},}}"},
    "schema": {
        "schema": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": LEAST}},
            "required": ["text"],
            "additionalProperties": False,
        }
    },
}


def structured(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Time per token of a free answer, and of a structured one."""
    for dtype in workload.dtypes:
        vlm = endless(workload, dtype)
        contenders = [Contender(OURS, partial(_write, vlm, {}), dtype)]
        contenders += [
            Contender(f"with a {name}", partial(_write, vlm, form), dtype)
            for name, form in FORMS.items()
        ]
        yield Case(f"structured, per token, {dtype}", contenders, units=TOKENS)


def questions(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Four questions about one image, encoded once or every time."""
    image = noise_image(WIDE)
    for dtype in workload.dtypes:
        vlm = endless(workload, dtype)
        tiles = vlm.plan(image).tiles
        yield Case(
            f"{len(QUESTIONS)} questions, one image of {tiles} tiles, {dtype}",
            [
                Contender(OURS, partial(_question, vlm, image, images=True, prefix=True), dtype),
                Contender("asked together", partial(_together, vlm, image), dtype),
                Contender("image kept alone", partial(_question, vlm, image, images=True), dtype),
                Contender("nothing kept", partial(_question, vlm, image), dtype),
            ],
        )


def endless(workload: Workload, dtype: str) -> VLM:
    """Return the workload's checkpoint, with answers that do not end by themselves."""
    vlm = load(workload.folder, dtype=dtype)
    vlm.eos_token_ids = ()
    return vlm


def _write(vlm: VLM, form: AnswerOptions) -> None:
    options: AnswerOptions = {"max_new_tokens": TOKENS, "seed": 0, "temperature": 1.0}
    options.update(form)
    answer = vlm.ask(text="Write.", **options)
    assert answer.usage.completion_tokens == TOKENS


def _together(vlm: VLM, image: Image.Image) -> None:
    vlm.clear_caches()
    vlm.ask_many([(image, question) for question in QUESTIONS], max_new_tokens=4)


def _question(vlm: VLM, image: Image.Image, *, images: bool = False, prefix: bool = False) -> None:
    vlm.clear_caches()
    for question in QUESTIONS:
        vlm.ask(image, question, max_new_tokens=4)
        if not images:
            vlm.image_cache.clear()
        if not prefix:
            vlm.clear_prefix_cache()
