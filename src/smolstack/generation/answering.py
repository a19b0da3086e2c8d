"""From prepared prompts to answers: pictures encoded once, tokens chosen, text streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.errors import GenerationError
from smolstack.generation.answer import Answer, Timings, Usage
from smolstack.generation.generate import Run, capacity, generate, start
from smolstack.generation.options import ReadOptions
from smolstack.generation.reuse import (
    PictureCache,
    PrefixCache,
    TokenKey,
    picture_key,
    token_keys,
)
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.geometry import TilePlan
from smolstack.processor.processor import Picture, Processor, Prompt


class Answering:
    """A model, its processor, and what they need not do twice.

    Attributes:
        pictures: visual tokens by content.
        prefix: the KV cache of the last conversation; None switches its reuse off.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor) -> None:
        self.model, self.processor = model, processor
        self.pictures = PictureCache()
        self.prefix: PrefixCache | None = PrefixCache()

    def encode(self, prompts: Sequence[Prompt]) -> Encoding:
        """Open and cut the pictures that are not known yet; no tower runs before ``finish``."""
        return Encoding(self, prompts)

    def forget(self) -> None:
        """Drop everything kept for reuse."""
        self.pictures.clear()
        if self.prefix is not None:
            self.prefix.clear()


class Encoding:
    """Pictures of prepared prompts on their way to visual tokens.

    Made in two steps, so that a bad picture is an error before any network runs: the constructor
    opens and cuts, :meth:`finish` encodes everything new in one go.
    """

    def __init__(self, answering: Answering, prompts: Sequence[Prompt]) -> None:
        self.answering, self.prompts = answering, prompts
        self.known: dict[bytes, VisualTokens] = {}
        self.cut: dict[bytes, tuple[Tensor, TilePlan]] = {}
        self.keys: list[list[bytes | VisualTokens]] = [
            [self._key(picture, plan) for picture, plan in zip(p.pictures, p.plans, strict=True)]
            for p in prompts
        ]

    def _key(self, picture: Picture, plan: TilePlan) -> bytes | VisualTokens:
        if isinstance(picture, VisualTokens):
            return picture
        processor = self.answering.processor
        key = picture_key(picture, plan, processor.settings, self.answering.model)
        if key not in self.known and key not in self.cut:
            found = self.answering.pictures.get(key)
            if found is not None:
                self.known[key] = found
            else:
                self.cut[key] = (processor.pixels(picture, plan), plan)
        return key

    def finish(self) -> list[Prompt]:
        """The prompts with visual tokens for pictures."""
        if self.cut:
            tiles = torch.cat([pixels for pixels, _ in self.cut.values()])
            with torch.inference_mode():
                visual = self.answering.model.encode_tiles(tiles)
            parts = torch.split(visual, [plan.tiles for _, plan in self.cut.values()])
            for (key, (_, plan)), tokens in zip(self.cut.items(), parts, strict=True):
                # A copy of its own: a view would keep every picture of the batch alive.
                own = tokens if len(parts) == 1 else tokens.clone()
                self.known[key] = VisualTokens(own, plan.rows, plan.cols, plan.source)
                self.answering.pictures.put(key, self.known[key])
            self.cut.clear()
        return [
            replace(prompt, pictures=tuple(self._visual(key) for key in keys))
            for prompt, keys in zip(self.prompts, self.keys, strict=True)
        ]

    def _visual(self, key: bytes | VisualTokens) -> VisualTokens:
        return key if isinstance(key, VisualTokens) else self.known[key]


class AnswerStream:
    """Pieces of the answers to prepared prompts; iterate over it, then read ``answer``.

    With several prompts the pieces are those of all of them, as they come; use ``answers``.
    """

    def __init__(
        self,
        answering: Answering,
        prompts: Sequence[Prompt],
        options: ReadOptions,
    ) -> None:
        self._answering, self._prompts, self._stopping = answering, prompts, options.stopping
        decode = answering.processor.tokenizer.decode
        self._run = start(
            [prompt.token_ids for prompt in prompts],
            options.sampling,
            options.stopping,
            partial(decode, skip_special=not options.keep_special_tokens),
            answering.model.config.text.max_positions,
        )
        began = perf_counter()
        self._encoding = answering.encode(prompts)
        self._picture_seconds = perf_counter() - began
        self._vision_seconds = 0.0
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
        model, prefix = self._answering.model, self._answering.prefix
        began = perf_counter()
        prompts = self._encoding.finish()
        self._vision_seconds = perf_counter() - began
        batch = self._answering.processor.batch(prompts)
        room = capacity(batch, self._run)
        keys: list[TokenKey] = []
        cache = None
        if prefix is not None and len(prompts) == 1:
            keys = _keys(prompts[0], model)
            cache = prefix.take(keys, room)
        cache = cache or model.new_cache(batch, room)
        first = True
        for event in generate(model, batch, self._run, self._stopping, cache):
            # The template leaves a space between "Assistant:" and the answer to the model.
            piece = event.piece.lstrip() if first else event.piece
            first = first and not piece
            if piece:
                yield piece
        if prefix is not None and keys:
            visual = [p.tokens for p in prompts[0].pictures if isinstance(p, VisualTokens)]
            prefix.put([*keys, *self._run.sequences[0].token_ids], cache, visual)

    def _timings(self) -> Timings:
        run = self._run
        return Timings(
            pictures=self._picture_seconds,
            vision=self._vision_seconds,
            prefill=run.prefill_seconds,
            decode=run.decode_seconds,
            decode_steps=run.decode_steps,
        )


def _keys(prompt: Prompt, model: VisionLanguageModel) -> list[TokenKey]:
    visual = [picture for picture in prompt.pictures if isinstance(picture, VisualTokens)]
    return token_keys(prompt.token_ids, model.config.image_token_id, visual)


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
