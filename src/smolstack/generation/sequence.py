"""One answer on its way through the scheduler: pictures, prompt, tokens, end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.generation.answer import Answer, Timings, TokenLogprob
from smolstack.generation.answering import Answering, Form, make_answer, prompt_keys
from smolstack.generation.choices import pick, score
from smolstack.generation.options import ReadOptions
from smolstack.generation.picturing import Cut, Picturing
from smolstack.generation.prefixes import PrefixPool
from smolstack.model.cache import KVCache
from smolstack.processor.geometry import TilePlan
from smolstack.processor.inputs import Picture
from smolstack.processor.processor import Prompt

Stage: TypeAlias = Literal["waiting", "pictures", "prefill", "decode", "done"]


@dataclass(frozen=True)
class Update:
    """What is new about one answer.

    Attributes:
        piece: characters that became certain.
        logprobs: of the tokens taken since the last update, where asked for.
        answer: the whole answer, in the last update of one that succeeded.
        error: why there is none, in the last update of one that failed.
    """

    piece: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    answer: Answer | None = None
    error: Exception | None = None


@dataclass
class Taken:
    """Seconds that the stages of one sequence took, shared ones counted in full."""

    picture_seconds: float = 0.0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0

    def timings(self) -> Timings:
        return Timings(
            self.picture_seconds,
            self.vision_seconds,
            self.prefill_seconds,
            self.decode_seconds,
            self.decode_steps,
        )


@dataclass
class _Wanted:
    """A picture that a sequence waits for."""

    picture: Picture
    plan: TilePlan
    future: Future[tuple[bytes, Cut | None]] | None = None
    key: bytes | None = None


class Sequence:
    """One answer; made in any thread, worked on by the scheduler's.

    Attributes:
        number: set by the scheduler.
        cancelled: set by anybody: the scheduler lets go of it at its next step.
        given_up: set by anybody: the same, and the listener is told this error.
        read_tokens: prompt tokens that were read, not copied.
    """

    def __init__(
        self,
        answering: Answering,
        prompt: Prompt,
        options: ReadOptions,
        listener: Callable[[Update], None],
        *,
        deadline: float | None = None,
        form: Form | None = None,
    ) -> None:
        self.answering, self.prompt, self.options = answering, prompt, options
        self.listener, self.deadline = listener, deadline
        form = form or Form(answering, options)
        self.growing = form.begin(prompt, options)
        self.number, self.cancelled, self.read_tokens = -1, False, 0
        self.given_up: Exception | None = None
        self.stage: Stage = "waiting"
        self.run = Taken()
        self.cache: KVCache | None = None
        self._choices = form.choices(prompt)
        self._scores: list[float] = []
        self._scoring: Iterator[list[float]] | None = None
        self._embeddings: Tensor | None = None
        self._told_logprobs = 0
        self._visual: list[VisualTokens | _Wanted] = []

    @property
    def last_token(self) -> int:
        return self.growing.token_ids[-1]

    @property
    def cache_in_use(self) -> KVCache:
        assert self.cache is not None
        return self.cache

    # Pictures

    def prepare(
        self, pictures: Picturing, workers: Executor | None, wake: Callable[[], None]
    ) -> None:
        """Begin to open and cut the pictures, in worker threads where there are some."""
        self.stage = "pictures"
        pairs = zip(self.prompt.pictures, self.prompt.plans, strict=True)
        for picture, plan in pairs:
            if isinstance(picture, VisualTokens):
                self._visual.append(picture)
                continue
            wanted = _Wanted(picture, plan)
            if workers is not None:
                wanted.future = workers.submit(self._cut, pictures, wanted)
                wanted.future.add_done_callback(lambda _: wake())
            self._visual.append(wanted)
        self._check_pictures()

    def collect(self, pictures: Picturing) -> None:
        """Take what the workers have finished.

        Raises:
            ImageError: a picture cannot be decoded.
        """
        if self.stage != "pictures":
            return
        for place, wanted in enumerate(self._visual):
            if isinstance(wanted, VisualTokens) or wanted.key is not None:
                continue
            if wanted.future is not None and not wanted.future.done():
                continue
            made = wanted.future.result() if wanted.future else self._cut(pictures, wanted)
            wanted.future, (key, cut) = None, made
            known = pictures.known(key)
            if known is not None:
                self._visual[place] = known
                continue
            if not pictures.want(key, cut, self.number):
                # It was known when its key was made, and dropped since.
                pictures.want(key, pictures.cut(wanted.picture, wanted.plan), self.number)
            wanted.key = key
        self._check_pictures()

    def resolve(self, complete: Mapping[bytes, VisualTokens]) -> None:
        """Take pictures that are encoded now."""
        if self.stage != "pictures":
            return
        for place, wanted in enumerate(self._visual):
            if isinstance(wanted, _Wanted) and wanted.key is not None and wanted.key in complete:
                self._visual[place] = complete[wanted.key]
        self._check_pictures()

    def _cut(self, pictures: Picturing, wanted: _Wanted) -> tuple[bytes, Cut | None]:
        began = perf_counter()
        made = pictures.prepare(wanted.picture, wanted.plan)
        self.run.picture_seconds += perf_counter() - began
        return made

    def _check_pictures(self) -> None:
        if all(isinstance(visual, VisualTokens) for visual in self._visual):
            self.stage = "prefill"

    # Prompt

    def prefill(self, tokens: int, prefixes: PrefixPool) -> bool:
        """Read up to ``tokens`` more of the prompt, or score some choices; True at an answer's
        first (or only) result."""
        began = perf_counter()
        try:
            with torch.inference_mode():
                if self._scoring is not None:
                    return self._score()
                logits = self._read(tokens, prefixes)
            if logits is None:
                return False
            if self._choices is not None:
                assert self.cache is not None
                self._scoring = score(
                    self.answering.model, logits, self.cache, self._choices, tokens
                )
                return False
        finally:
            self.run.prefill_seconds += perf_counter() - began
        self.stage = "decode"
        self.take(logits)
        return True

    def _read(self, tokens: int, prefixes: PrefixPool) -> Tensor | None:
        """Read a part of the prompt; logits (V,) after its last token, or None before that."""
        model = self.answering.model
        if self._embeddings is None or self.cache is None:
            visual = [v for v in self._visual if isinstance(v, VisualTokens)]
            prompt = replace(self.prompt, pictures=tuple(visual))
            batch = self.answering.processor.batch([prompt])
            self._embeddings = model.merge(batch)
            room = len(prompt.token_ids) + (0 if self._choices else self.growing.limit)
            keys = prompt_keys(prompt, model)
            self.cache = prefixes.longest(keys[:-1], room)
            if self.cache is None:
                self.cache = model.new_cache(batch, room)
            prefixes.work(self.number, keys, self.cache, [v.tokens for v in visual])
        start = self.cache.length
        part = self._embeddings[:, start : start + tokens]
        logits = model.read(part, self.cache)
        self.read_tokens += part.shape[1]
        if self.cache.length < self._embeddings.shape[1]:
            return None
        self._embeddings = None
        return logits[0]

    def _score(self) -> bool:
        assert self._scoring is not None
        assert self._choices is not None
        self._scores += next(self._scoring)
        if len(self._scores) < len(self._choices):
            return False
        chosen = self._choices[pick(self._scores, self.options.sampling)]
        self._tell(self.growing.take_all(chosen))
        return True

    # Tokens

    def take(self, logits: Tensor) -> None:
        """Choose the next token, from logits (V,), and tell what became certain."""
        _, piece = self.growing.take(logits)
        self._tell(piece)

    def _tell(self, piece: str) -> None:
        logprobs = tuple(self.growing.logprobs[self._told_logprobs :])
        self._told_logprobs += len(logprobs)
        answer = None
        if self.growing.finish_reason is not None:
            self.stage = "done"
            answer = make_answer(
                self.prompt, self.growing, self.run.timings(), self.options, self._scores or None
            )
        if piece or logprobs or answer is not None:
            self.listener(Update(piece, logprobs, answer))

    def fail(self, error: Exception) -> None:
        """Tell that there will be no answer."""
        self.stage = "done"
        self.listener(Update(error=error))

    def let_go(self) -> None:
        """Give back everything that is large."""
        self.stage = "done"
        for wanted in self._visual:
            if isinstance(wanted, _Wanted) and wanted.future is not None:
                wanted.future.cancel()
        self.cache = self._embeddings = self._scoring = None
        self._visual = []
