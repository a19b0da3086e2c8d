"""VLM: a loaded checkpoint and everything that can be asked of it. The public API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from smolstack.generation.answer import Answer, Timings, Usage
from smolstack.batch import Batch, VisualTokens
from smolstack.checkpoint.hub import find
from smolstack.checkpoint.load import Checkpoint, load_checkpoint
from smolstack.checkpoint.save import save_checkpoint
from smolstack.errors import GenerationError, PromptError
from smolstack.generation.generate import Run, generate, start
from smolstack.generation.sampling import Sampling
from smolstack.generation.stopping import RepetitionRule, Stopping
from smolstack.processor.geometry import TilePlan
from smolstack.processor.processor import Picture, Prompt, PromptLike, as_pictures
from smolstack.processor.prompt import Message
from smolstack.processor.tiles import ImageSource


def load(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
) -> VLM:
    """Load a checkpoint.

    Args:
        model: a Hugging Face checkpoint folder, or a hub id (needs the extra ``hf``); None is the
            small reader that comes with the package.
        dtype: "float32", "bfloat16", "float16", or "auto": the weights' own, except on a CPU
            that cannot compute in it, where float32 is faster and loses nothing.
        device: "cpu", "cuda", "mps", … or "auto", the fastest that is there.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConfigError: a config file lacks a key or holds a value that cannot be built.
        CheckpointError: the folder, its weights or its tokenizer cannot be used.
    """
    return VLM(load_checkpoint(find(model, revision), dtype, device))


class VLM:
    """A vision-language model that answers questions about pictures.

    Attributes:
        model: the network; ``vlm.model(batch)`` gives logits (B, T, V).
        processor: ``vlm.processor(prompts)`` gives a Batch.
        config: sizes of both towers and the bridge.
        folder: where the checkpoint was loaded from.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model, self.processor = checkpoint.model, checkpoint.processor
        self.config, self.folder = checkpoint.config, checkpoint.files.folder
        self.eos_token_ids = checkpoint.eos_token_ids
        self._side = checkpoint.files.side

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights in use."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def ask(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer one question about pictures, or the last message of a chat.

        Args:
            images: a picture or several in order: a path, bytes, a Pillow picture, a uint8 array
                (H, W, 3), or visual tokens from :meth:`encode`.
            text: the question. Pictures and text become one user message.
            messages: a whole chat instead of images and text.
            **options: max_new_tokens (512), temperature (0: greedy), top_p, top_k, min_p,
                repetition_penalty, seed, stop (strings), stop_on_repetition (False), split (None:
                as the checkpoint says).

        Raises:
            ImageError, PromptError, ContextLengthError, GenerationError: before any work is done.
        """
        stream = self.stream(images, text, messages=messages, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        **options: Any,
    ) -> AnswerStream:
        """As :meth:`ask`, in pieces as they are read: never half a character.

        Bad input raises here, not at the first piece. ``stream.answer`` is the whole answer once
        the pieces are exhausted.
        """
        entry = _entry(images, text, messages)
        sampling, stopping, split = self._options(options)
        return AnswerStream(self, [self.processor.prepare(entry, split=split)], sampling, stopping)

    def ask_many(self, prompts: Sequence[PromptLike], **options: Any) -> list[Answer]:
        """Answer several prompts as one batch: each as :meth:`ask` would alone.

        Args:
            prompts: per sequence a text, ``(pictures, text)``, or the messages of a chat.
            **options: as for :meth:`ask`, the same for all.
        """
        if isinstance(prompts, str) or not prompts:
            raise PromptError("expected a list of prompts, one per answer")
        sampling, stopping, split = self._options(options)
        prepared = [self.processor.prepare(entry, split=split) for entry in prompts]
        stream = AnswerStream(self, prepared, sampling, stopping)
        for _ in stream:
            pass
        return stream.answers

    def plan(
        self,
        image: ImageSource | VisualTokens | tuple[int, int],
        text: str = "",
        *,
        split: bool | None = None,
    ) -> TilePlan:
        """How a picture, or one of (width, height) pixels, becomes tiles and tokens.

        ``prompt_tokens`` counts the whole prompt of asking ``text`` about this picture.
        """
        plan = self.processor.plan(image, split=split)
        return plan.with_prompt_tokens(self.processor.count_tokens([plan], text))

    def encode(self, image: ImageSource, *, split: bool | None = None) -> VisualTokens:
        """Visual tokens of one picture, reusable in any number of questions.

        The tower and the connector run once, here; ``ask(visual, …)`` goes on from there.
        """
        plan = self.processor.plan(image, split=split)
        with torch.inference_mode():
            tokens = self.model.encode_tiles(self.processor.pixels(image, plan))
        return VisualTokens(tokens, plan.rows, plan.cols, plan.source)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the checkpoint as a Hugging Face folder; complete or not at all."""
        return save_checkpoint(folder, self.model, self._side, overwrite=overwrite)

    def _options(self, given: dict[str, Any]) -> tuple[Sampling, Stopping, bool | None]:
        """Checked options of ask, stream and ask_many."""
        known = {
            **{"max_new_tokens": 512, "stop": (), "stop_on_repetition": False, "split": None},
            **{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
            **{"repetition_penalty": 1.0, "seed": None},
        }
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise GenerationError(f"unknown options {unknown}, expected some of {sorted(known)}")
        known.update(given)
        stop, circles = known.pop("stop"), known.pop("stop_on_repetition")
        if circles is True:
            circles = RepetitionRule()
        stopping = Stopping(
            max_new_tokens=known.pop("max_new_tokens"),
            eos_token_ids=self.eos_token_ids,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            repetition=circles or None,
        )
        split = known.pop("split")
        return Sampling(**known), stopping, split


class AnswerStream:
    """Pieces of the answers to prepared prompts; iterate over it, then read ``answer``.

    With several prompts the pieces are those of all of them, as they come; use ``answers``.
    """

    def __init__(
        self, vlm: VLM, prompts: Sequence[Prompt], sampling: Sampling, stopping: Stopping
    ) -> None:
        self._vlm, self._prompts, self._stopping = vlm, prompts, stopping
        began = perf_counter()
        batch, self._vision_seconds = _encode_given(vlm, prompts)
        self._picture_seconds = perf_counter() - began - self._vision_seconds
        self._batch = batch
        limit = vlm.config.text.max_positions
        self._run = start(batch, sampling, stopping, vlm.processor.tokenizer.decode, limit)
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
        batch, vision = _encode_pictures(self._vlm, self._batch)
        self._vision_seconds += vision
        first = True
        for event in generate(self._vlm.model, batch, self._run, self._stopping):
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


def _entry(images: Any, text: str | None, messages: Sequence[Message] | None) -> PromptLike:
    if messages is not None:
        if images is not None or text is not None:
            raise PromptError("give either images and text, or messages, not both")
        return messages
    if text is None:
        raise PromptError("there is no question: give text, or messages")
    return as_pictures(images), text


def _encode_given(vlm: VLM, prompts: Sequence[Prompt]) -> tuple[Batch, float]:
    """The batch of prompts; where only some pictures are visual tokens, all are made so."""
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    given = [isinstance(picture, VisualTokens) for picture in pictures]
    began = perf_counter()
    if any(given) and not all(given):
        prompts = [_all_encoded(vlm, prompt) for prompt in prompts]
    seconds = perf_counter() - began if any(given) else 0.0
    return vlm.processor.batch(prompts), seconds


def _all_encoded(vlm: VLM, prompt: Prompt) -> Prompt:
    pictures = tuple(
        picture
        if isinstance(picture, VisualTokens)
        else vlm.encode(picture, split=plan.rows > 0)
        for picture, plan in zip(prompt.pictures, prompt.plans, strict=True)
    )
    return replace(prompt, pictures=pictures)


def _encode_pictures(vlm: VLM, batch: Batch) -> tuple[Batch, float]:
    """The batch with its tiles as visual tokens, and the seconds that took."""
    if batch.visual_tokens is not None or not batch.tiles_per_image:
        return batch, 0.0
    began = perf_counter()
    with torch.inference_mode():
        visual = vlm.model.encode_tiles(batch.tiles, batch.tile_grids)
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
