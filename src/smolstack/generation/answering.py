"""From prepared prompts to answers: pictures encoded once, tokens chosen, text streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter

import torch

from smolstack.batch import Batch, VisualTokens
from smolstack.errors import GenerationError
from smolstack.generation.answer import Answer, Timings, Usage
from smolstack.generation.generate import Run, generate, start
from smolstack.generation.sampling import Sampling
from smolstack.generation.stopping import Stopping
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.geometry import TilePlan
from smolstack.processor.processor import Processor, Prompt
from smolstack.processor.tiles import ImageSource


class AnswerStream:
    """Pieces of the answers to prepared prompts; iterate over it, then read ``answer``.

    With several prompts the pieces are those of all of them, as they come; use ``answers``.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        stopping: Stopping,
    ) -> None:
        self._model, self._prompts, self._stopping = model, prompts, stopping
        began = perf_counter()
        batch, self._vision_seconds = _encode_given(model, processor, prompts)
        self._picture_seconds = perf_counter() - began - self._vision_seconds
        self._batch = batch
        limit = model.config.text.max_positions
        self._run = start(batch, sampling, stopping, processor.tokenizer.decode, limit)
        self._pieces = self._generate()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The answer to the only (or first) prompt; complete once the pieces are exhausted."""
        return self.answers[0]

    @property
    def answers(self) -> list[Answer]:
        """One answer per prompt, in order."""
        if any(sequence.finish_reason is None for sequence in self._run.sequences):
            raise GenerationError("the answer is not complete yet; iterate over the stream first")
        return [_answer(p, self._run, row, self._timings()) for row, p in enumerate(self._prompts)]

    def _generate(self) -> Iterator[str]:
        batch, vision = _encode_pictures(self._model, self._batch)
        self._vision_seconds += vision
        first = True
        for event in generate(self._model, batch, self._run, self._stopping):
            # The template leaves a space between "Assistant:" and the answer to the model.
            piece = event.piece.lstrip() if first else event.piece
            first = first and not piece
            if piece:
                yield piece

    def _timings(self) -> Timings:
        run = self._run
        return Timings(
            pictures=self._picture_seconds,
            vision=self._vision_seconds,
            prefill=run.prefill_seconds,
            decode=run.decode_seconds,
            decode_steps=run.decode_steps,
        )


def encode_picture(
    model: VisionLanguageModel, processor: Processor, picture: ImageSource, plan: TilePlan
) -> VisualTokens:
    """One picture through tower and connector, as planned."""
    with torch.inference_mode():
        tokens = model.encode_tiles(processor.pixels(picture, plan))
    return VisualTokens(tokens, plan.rows, plan.cols, plan.source)


def _encode_given(
    model: VisionLanguageModel, processor: Processor, prompts: Sequence[Prompt]
) -> tuple[Batch, float]:
    """The batch of prompts; where only some pictures are visual tokens, all are made so."""
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    given = [isinstance(picture, VisualTokens) for picture in pictures]
    began = perf_counter()
    if any(given) and not all(given):
        prompts = [_all_encoded(model, processor, prompt) for prompt in prompts]
    seconds = perf_counter() - began if any(given) else 0.0
    return processor.batch(prompts), seconds


def _all_encoded(model: VisionLanguageModel, processor: Processor, prompt: Prompt) -> Prompt:
    pictures = tuple(
        picture
        if isinstance(picture, VisualTokens)
        else encode_picture(model, processor, picture, plan)
        for picture, plan in zip(prompt.pictures, prompt.plans, strict=True)
    )
    return replace(prompt, pictures=pictures)


def _encode_pictures(model: VisionLanguageModel, batch: Batch) -> tuple[Batch, float]:
    """The batch with its tiles as visual tokens, and the seconds that took."""
    if batch.visual_tokens is not None or not batch.tiles_per_image:
        return batch, 0.0
    began = perf_counter()
    with torch.inference_mode():
        visual = model.encode_tiles(batch.tiles, batch.tile_grids)
    return replace(batch, visual_tokens=visual), perf_counter() - began


def _answer(prompt: Prompt, run: Run, row: int, timings: Timings) -> Answer:
    sequence = run.sequences[row]
    assert sequence.finish_reason is not None
    return Answer(
        text=sequence.stream.text.strip(),
        finish_reason=sequence.finish_reason,
        token_ids=tuple(sequence.token_ids),
        usage=Usage(
            prompt_tokens=sequence.prompt_tokens,
            visual_tokens=sum(plan.visual_tokens for plan in prompt.plans),
            completion_tokens=len(sequence.token_ids),
            tiles=sum(plan.tiles for plan in prompt.plans),
        ),
        timings=timings,
    )
