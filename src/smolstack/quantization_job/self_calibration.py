"""Calibration without data: text that the model generates, and drawn images.

A model's own text resembles what it will generate later (Liu et al. 2023, LLM-QAT). It is sampled
at temperature 1 from several beginnings, to cover the model's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from smolstack.generation.answer import Answer
from smolstack.generation.inline import InlineEngine
from smolstack.generation.options import read_options
from smolstack.processor.inputs import as_messages
from smolstack.processor.processor import Prompt
from smolstack.quantization.calibration import drawn_tokens
from smolstack.quantization_job.samples import WINDOW, Sample
from smolstack.vlm import VLM

OPENINGS = (
    "Tell me a story about a journey.",
    "Explain how something in your kitchen works.",
    "Write a letter to an old friend.",
    "List ten things and say a word about each.",
    "Write a short program and explain it.",
    "What happened in history that people should know of?",
    "Describe an animal, a plant and a machine.",
    "Write a conversation between two people in a shop.",
    "Give me the steps of a recipe.",
    "Solve a problem from school mathematics, step by step.",
    "Summarise the news of an imaginary town.",
    "Write a table of countries with their capitals.",
    "What would you advise somebody who moves to a new city?",
    "Describe how the weather comes about.",
    "Write a poem and a review of it.",
    "Explain a word that has several meanings.",
)
_LONGEST = 384  # tokens per text
_ANSWER = 48  # tokens per answer about an image
_TOGETHER = 8
_SIZES = ((640, 480), (480, 640), (512, 512), (900, 300))


class Kept(Protocol):
    """Stores generated text by name, so that an interruption loses little of it."""

    def json(self, name: str) -> Any: ...

    def put_json(self, name: str, data: Any) -> None: ...


def own_text(vlm: VLM, tokens: int, kept: Kept, told: Callable[[int, int], None]) -> list[Sample]:
    """Generate texts with ``tokens`` tokens together.

    Args:
        told: called with the number of tokens done and the total.
    """
    if not writes(vlm):
        return list(_drawn_text(vlm, tokens))
    found: list[Sample] = []
    held = turn = 0
    while held < tokens:
        known = kept.json(f"texts.{turn}")
        if known is None:
            known = _texts(vlm, turn)
            kept.put_json(f"texts.{turn}", known)
        turn += 1
        for ids in known:
            if held < tokens:
                found.append(Sample.of_tokens(f"own text {len(found) + 1}", ids))
                held += len(ids)
        told(min(held, tokens), tokens)
    return found


def _texts(vlm: VLM, turn: int) -> list[list[int]]:
    """Return the token ids of some questions with the model's answers."""
    first = turn * _TOGETHER
    asked = [OPENINGS[(first + i) % len(OPENINGS)] for i in range(_TOGETHER)]
    prompts = [vlm.processor.prepare(question) for question in asked]
    room = vlm.config.text.max_positions - max(len(prompt.token_ids) for prompt in prompts)
    answers = vlm.ask_many(
        asked,
        max_new_tokens=max(1, min(_LONGEST, room)),
        temperature=1.0,
        seed=turn,
        keep_special_tokens=True,
        stop_on_repetition=True,
    )
    both = zip(prompts, answers, strict=True)
    return [list(_with_answer(vlm, prompt, answer)) for prompt, answer in both]


def _drawn_text(vlm: VLM, tokens: int) -> Iterator[Sample]:
    """Return random tokens."""
    length = min(WINDOW, vlm.config.text.max_positions)
    for number in range(max(2, tokens // length)):
        ids = drawn_tokens(
            vlm.config.text.vocab_size,
            [vlm.config.image_token_id],
            vlm.config.text.bos_token_id,
            count=length,
            seed=number,
        )
        yield Sample.of_tokens(f"drawn tokens {number + 1}", ids[0].tolist())


def writes(vlm: VLM) -> bool:
    """Whether a checkpoint generates answers: it has a language head and a chat template."""
    return vlm.config.embedding_dim is None and vlm.processor.template is not None


def answered(
    vlm: VLM,
    engine: InlineEngine,
    samples: Sequence[Sample],
    kept: Kept,
    told: Callable[[int, int], None],
) -> list[Sample]:
    """Append the beginning of the model's answer to samples that end with a question."""
    found = list(samples)
    asking = [i for i, sample in enumerate(samples) if sample.asks and writes(vlm)]
    for number, place in enumerate(asking):
        prompt, name = samples[place].prompt, f"answers.{number}"
        known = kept.json(name)
        if known is None:
            room = vlm.config.text.max_positions - len(prompt.token_ids)
            known = list(prompt.token_ids)
            if room > 0:
                options = read_options({"max_new_tokens": min(_ANSWER, room)}, vlm.eos_token_ids)
                requests = engine.core.requests([prompt], options)
                engine.core.open_images(requests)
                (answer,) = engine.answers(requests)
                known = list(_with_answer(vlm, prompt, answer))
            kept.put_json(name, known)
        found[place] = samples[place].with_tokens(known)
        told(number + 1, len(asking))
    return found


def drawn_images(count: int) -> list[Image.Image]:
    """Draw reproducible images of shapes, gradients, noise and lines of letters."""
    random = np.random.default_rng(23)
    found = []
    for number in range(count):
        width, height = _SIZES[number % len(_SIZES)]
        across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        ends = random.uniform(0, 255, (2, 2, 3))
        pixels = (
            ends[0, 0] * ((1 - across) * (1 - down))[..., None]
            + ends[0, 1] * (across * (1 - down))[..., None]
            + ends[1, 0] * ((1 - across) * down)[..., None]
            + ends[1, 1] * (across * down)[..., None]
        )
        pixels += random.normal(0, random.uniform(0, 20), pixels.shape)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        _draw(ImageDraw.Draw(image), random, width, height)
        found.append(image)
    return found


def _draw(draw: ImageDraw.ImageDraw, random: np.random.Generator, width: int, height: int) -> None:
    for _ in range(int(random.integers(3, 14))):
        x, y = random.uniform(0, width), random.uniform(0, height)
        wide, high = random.uniform(4, width / 2), random.uniform(4, height / 2)
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        box = (x, y, x + wide, y + high)
        shape = int(random.integers(3))
        if shape == 0:
            draw.rectangle(box, fill=colour)
        elif shape == 1:
            draw.ellipse(box, fill=colour)
        else:
            draw.line(box, fill=colour, width=int(random.integers(1, 9)))
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789,.-")
    for line in range(int(random.integers(0, 8))):
        text = "".join(random.choice(letters, int(random.integers(4, 40))))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        draw.text((8, 8 + line * height / 9), text, fill=colour, font_size=max(8, height // 20))


def image_samples(vlm: VLM, images: Sequence[Image.Image], question: str) -> list[Sample]:
    """Return a question about each image; none if there is no chat template."""
    made: list[Sample] = []
    if vlm.processor.template is None:
        return made
    for number, image in enumerate(images):
        messages, shown = as_messages(([image], question), vlm.processor.open_video)
        prompt = vlm.processor.prepare_text(vlm.processor.render(messages), shown)
        made.append(Sample(f"drawn image {number + 1}", prompt, asks=True))
    return made


def _with_answer(vlm: VLM, prompt: Prompt, answer: Answer) -> tuple[int, ...]:
    ids = vlm.processor.tokenizer.encode(answer.text, special=False)
    room = vlm.config.text.max_positions - len(prompt.token_ids)
    known = [i for i in ids if i != vlm.config.image_token_id][:room]
    return (*prompt.token_ids, *known)
