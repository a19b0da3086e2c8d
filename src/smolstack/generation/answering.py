"""From prepared prompts to answers: pictures encoded once, tokens chosen, text streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from smolstack.batch import Batch, VisualTokens
from smolstack.errors import GenerationError
from smolstack.generation.answer import Answer, Timings, Usage
from smolstack.generation.beginning import share_beginning
from smolstack.generation.choices import continuations, pick, probabilities, score
from smolstack.generation.generate import Growing, Run, begin, capacity, generate, timed
from smolstack.generation.options import ReadOptions
from smolstack.generation.pictures import PictureCache
from smolstack.generation.reuse import PrefixCache, TokenKey, token_keys
from smolstack.generation.structured import Choices, Grammars, Regex, Schema
from smolstack.model.cache import KVCache
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.geometry import TilePlan
from smolstack.processor.inputs import Picture
from smolstack.processor.processor import Processor, Prompt


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
        self._grammars: dict[tuple[int, ...], Grammars] = {}

    def encode(self, prompts: Sequence[Prompt]) -> Encoding:
        """Open and cut the pictures that are not known yet; no tower runs before ``finish``."""
        return Encoding(self, prompts)

    def grammars(self, eos_token_ids: tuple[int, ...]) -> Grammars:
        """Grammars over this checkpoint's vocabulary, for answers that these tokens end."""
        if eos_token_ids not in self._grammars:
            self._grammars[eos_token_ids] = Grammars(
                self.processor.tokenizer,
                self.model.config.text.vocab_size,
                eos_token_ids,
                self.processor.answer_lead,
                self.processor.pointing,
            )
        return self._grammars[eos_token_ids]

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
        pictures, model = self.answering.pictures, self.answering.model
        key = pictures.key(picture, plan, processor.settings, model)
        if key not in self.known and key not in self.cut:
            found = pictures.get(key)
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

    Args:
        prefix: a cache that holds the beginning of every prompt (beginning.py); it is
            copied and stays as it is.
    """

    def __init__(
        self,
        answering: Answering,
        prompts: Sequence[Prompt],
        options: ReadOptions,
        prefix: KVCache | None = None,
    ) -> None:
        self._answering, self._prompts, self._options = answering, prompts, options
        self._prefix = prefix
        self._form = Form(answering, options)
        self._run = Run([self._form.begin(prompt) for prompt in prompts])
        self._choices = [self._form.choices(prompt) for prompt in prompts]
        began = perf_counter()
        self._encoding = answering.encode(prompts)
        self._picture_seconds = perf_counter() - began
        self._vision_seconds = 0.0
        self._scores: list[list[float]] = []
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
        scores: Sequence[list[float] | None] = self._scores or [None] * len(self._prompts)
        return [
            make_answer(prompt, sequence, self._timings(), self._options, score)
            for prompt, sequence, score in zip(
                self._prompts, self._run.sequences, scores, strict=True
            )
        ]

    def _generate(self) -> Iterator[str]:
        began = perf_counter()
        prompts = self._encoding.finish()
        self._vision_seconds = perf_counter() - began
        if self._choices[0] is not None:
            for row, prompt in enumerate(prompts):
                yield self._choose(prompt, row)
            return
        batch = self._answering.processor.batch(prompts)
        cache, keys = self._cache(prompts, batch, capacity(batch, self._run))
        for event in generate(self._answering.model, batch, self._run, cache):
            if event.piece:
                yield event.piece
        self._keep(prompts, [*keys, *self._run.sequences[0].token_ids], cache)

    def _choose(self, prompt: Prompt, row: int) -> str:
        """Score every choice after one prompt and answer with one of them."""
        model, choices = self._answering.model, self._choices[row]
        assert choices is not None
        batch = self._answering.processor.batch([prompt])
        cache, keys = self._cache([prompt], batch, batch.token_ids.shape[1])
        logits = timed(self._run, "prefill_seconds", lambda: model.prefill(batch, cache))[0]
        began = perf_counter()
        scores = [value for some in score(model, logits, cache, choices) for value in some]
        self._run.decode_seconds += perf_counter() - began
        self._scores.append(scores)
        self._keep([prompt], keys, cache)
        return self._run.sequences[row].take_all(choices[pick(scores, self._options.sampling)])

    def _cache(
        self, prompts: Sequence[Prompt], batch: Batch, room: int
    ) -> tuple[KVCache, list[TokenKey]]:
        """A cache for a batch, holding what is known of a single prompt or what several begin with;
        and the first prompt's keys."""
        model, prefix = self._answering.model, self._answering.prefix
        if self._prefix is not None:
            return self._prefix.forked(room), []
        if prefix is None:
            return model.new_cache(batch, room), []
        keys = [prompt_keys(prompt, model) for prompt in prompts]
        if len(prompts) == 1:
            return prefix.take(keys[0], room) or model.new_cache(batch, room), keys[0]
        began = perf_counter()
        shared = share_beginning(model, batch, keys, room)
        self._run.prefill_seconds += perf_counter() - began
        return shared or model.new_cache(batch, room), keys[0]

    def _keep(self, prompts: Sequence[Prompt], keys: list[TokenKey], cache: KVCache) -> None:
        """Keep the cache of a single prompt for the next one that begins like it."""
        prefix = self._answering.prefix
        if prefix is not None and len(prompts) == 1:
            visual = [p.tokens for p in prompts[0].pictures if isinstance(p, VisualTokens)]
            prefix.put(keys, cache, visual)

    def _timings(self) -> Timings:
        run = self._run
        return Timings(
            pictures=self._picture_seconds,
            vision=self._vision_seconds,
            prefill=run.prefill_seconds,
            decode=run.decode_seconds,
            decode_steps=run.decode_steps,
        )


class Form:
    """What every answer under the same options begins with; compiled once, checked at once."""

    def __init__(self, answering: Answering, options: ReadOptions) -> None:
        self.answering, self.options = answering, options
        self._decode = partial(
            answering.processor.tokenizer.decode, skip_special=not options.keep_special_tokens
        )
        structure = options.structure
        self._grammar = (
            answering.grammars(options.stopping.eos_token_ids).compile(structure)
            if isinstance(structure, (Schema, Regex))
            else None
        )

    def begin(self, prompt: Prompt, options: ReadOptions | None = None) -> Growing:
        """An answer to a prompt that has not begun; ``options`` may differ in their sampling.

        Raises:
            ContextLengthError: the prompt leaves no room for it.
        """
        constraint = None
        if self._grammar is not None:
            grammars = self.answering.grammars(self.options.stopping.eos_token_ids)
            # Special tokens that are kept would be text, which the form would have to know.
            pointing = not self.options.keep_special_tokens
            constraint = grammars.constraint(self._grammar, pointing=pointing)
        positions = self.answering.model.config.text.max_positions
        return begin(prompt.token_ids, options or self.options, self._decode, positions, constraint)

    def choices(self, prompt: Prompt) -> list[tuple[int, ...]] | None:
        """Token ids of each choice after a prompt, or None when there are none."""
        if not isinstance(self.options.structure, Choices):
            return None
        return continuations(
            self.answering.processor,
            prompt,
            self.answering.processor.answer_lead,
            self.options.structure.texts,
            self.options.stopping.eos_token_ids,
        )


def prompt_keys(prompt: Prompt, model: VisionLanguageModel) -> list[TokenKey]:
    """What the prefix cache compares of a prompt whose pictures are visual tokens."""
    visual = [picture for picture in prompt.pictures if isinstance(picture, VisualTokens)]
    return token_keys(prompt.token_ids, model.config.image_token_id, visual)


def make_answer(
    prompt: Prompt,
    sequence: Growing,
    timings: Timings,
    options: ReadOptions,
    scores: Sequence[float] | None = None,
) -> Answer:
    """The answer that a finished sequence holds; ``scores`` are those of its choices."""
    assert sequence.finish_reason is not None
    structure, text = options.structure, sequence.text
    parsed = None
    if isinstance(structure, Schema) and sequence.finish_reason == "stop":
        parsed = structure.parse(text)
    answer = Answer(
        text=text,
        finish_reason=sequence.finish_reason,
        token_ids=tuple(sequence.token_ids),
        usage=Usage(
            prompt_tokens=sequence.prompt_tokens,
            visual_tokens=sum(plan.visual_tokens for plan in prompt.plans),
            completion_tokens=len(sequence.token_ids),
            tiles=sum(plan.tiles for plan in prompt.plans),
        ),
        timings=timings,
        logprobs=None if options.logprobs is None else tuple(sequence.logprobs),
        parsed=parsed,
    )
    if scores is None or not isinstance(structure, Choices):
        return answer
    return replace(
        answer,
        probabilities=dict(zip(structure.texts, probabilities(scores), strict=True)),
        choice_logprobs=dict(zip(structure.texts, scores, strict=True)),
    )
