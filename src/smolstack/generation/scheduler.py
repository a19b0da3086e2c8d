"""Continuous batching: sequences join between two decoding steps and leave when they are done.

One step is: take in newcomers; one bounded piece of a newcomer's work (a micro-batch of tiles, or
some tokens of a prompt); one token for everybody who is that far. So nobody's decoding waits for
more than one such piece, and an answer is the one that ``ask`` gives, whoever shares the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from smolstack.errors import DeadlineError, GenerationError, QueueFullError
from smolstack.generation.answering import Answering
from smolstack.generation.options import ReadOptions
from smolstack.generation.picturing import Picturing
from smolstack.generation.prefixes import PrefixPool
from smolstack.generation.sequence import Sequence, Update
from smolstack.model.cache import CacheRows
from smolstack.processor.processor import Prompt

_DEFAULT_PREFIX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class SchedulerLimits:
    """How much is done at a time.

    Attributes:
        running: sequences at work at the same time; each holds its KV cache.
        queued: sequences that may wait beside them.
        tiles: tiles of one vision micro-batch.
        prefill_tokens: prompt tokens read in one piece.
        prefix_bytes: KV caches of finished sequences kept for prompts that begin alike.
    """

    running: int = 16
    queued: int = 64
    tiles: int = 4
    prefill_tokens: int = 512
    prefix_bytes: int = _DEFAULT_PREFIX_BYTES

    def __post_init__(self) -> None:
        for name in ("running", "tiles", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise GenerationError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("queued", "prefix_bytes"):
            if getattr(self, name) < 0:
                raise GenerationError(f"{name} is {getattr(self, name)}, expected 0 or more")


class Scheduler:
    """Answers many prompts at once on one model. Not thread-safe: one thread calls it.

    Args:
        answering: the model, its processor and its picture cache.
        limits: how much is done at a time.
        workers: threads that open and cut pictures; None does it inside :meth:`step`.
        clock: seconds, for deadlines.
        wake: called, from any thread, when a worker has finished something.
    """

    def __init__(
        self,
        answering: Answering,
        limits: SchedulerLimits | None = None,
        *,
        workers: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.answering, self.limits = answering, limits or SchedulerLimits()
        self.workers, self.clock, self.wake = workers, clock, wake
        self.pictures = Picturing(answering.model, answering.processor, answering.pictures)
        self.prefixes = PrefixPool(self.limits.prefix_bytes)
        self.decode_steps = self.generated_tokens = self.prefill_tokens = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._next_number = 0

    def submit(
        self,
        prompt: Prompt,
        options: ReadOptions,
        listener: Callable[[Update], None],
        deadline: float | None = None,
    ) -> Sequence:
        """Ask for an answer.

        Args:
            listener: told every new piece, and last the answer or an error; it must be quick.
            deadline: on the scheduler's clock.

        Raises:
            QueueFullError: too many wait already.
            ContextLengthError, GenerationError: the prompt or its options cannot be answered.
        """
        self.check_room(1)
        sequence = Sequence(self.answering, prompt, options, listener, deadline=deadline)
        return self.add(sequence)

    def check_room(self, sequences: int) -> None:
        """Raises QueueFullError unless so many more may be submitted."""
        room = self.limits.running + self.limits.queued
        if len(self.waiting) + len(self.running) + sequences > room:
            raise QueueFullError(
                f"{len(self.running)} answers are at work and {len(self.waiting)} wait, "
                f"the limit is {room}"
            )

    def add(self, sequence: Sequence) -> Sequence:
        """Queue a sequence that was made elsewhere."""
        sequence.number, self._next_number = self._next_number, self._next_number + 1
        self.waiting.append(sequence)
        return sequence

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nobody is at work."""
        return not self.waiting and not self.running

    def step(self) -> bool:
        """Do one step; False when there was nothing that could be done."""
        self._clear_out()
        self._take_in()
        worked = self._newcomer()
        return self._decode() or worked

    def _clear_out(self) -> None:
        """Let go of sequences that were cancelled, given up, or are out of time."""
        now = self.clock()
        for sequence in [*self.running, *self.waiting]:
            if sequence.cancelled:
                self._leave(sequence)
            elif sequence.given_up is not None:
                self._fail(sequence, sequence.given_up)
            elif sequence.deadline is not None and now >= sequence.deadline:
                self._fail(sequence, DeadlineError("the answer took longer than its deadline"))

    def _take_in(self) -> None:
        while self.waiting and len(self.running) < self.limits.running:
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            sequence.prepare(self.pictures, self.workers, self.wake)

    def _newcomer(self) -> bool:
        """One bounded piece of work for those who do not decode yet."""
        for sequence in self.running:
            try:
                sequence.collect(self.pictures)
            except Exception as error:
                self._fail(sequence, error)
                return True
        for sequence in self.running:
            if sequence.stage == "prefill":
                self._guarded(sequence, lambda s=sequence: self._prefill(s))  # type: ignore[misc]
                return True
        if len(self.pictures):
            self._encode()
            return True
        return False

    def _encode(self) -> None:
        began = time.perf_counter()
        try:
            complete, for_whom = self.pictures.step(self.limits.tiles)
        except Exception as error:
            for sequence in [s for s in self.running if s.stage == "pictures"]:
                self._fail(sequence, error)
            return
        took = time.perf_counter() - began
        for sequence in self.running:
            if sequence.number in for_whom:
                sequence.run.vision_seconds += took
            sequence.resolve(complete)

    def _prefill(self, sequence: Sequence) -> None:
        before = sequence.read_tokens
        finished = sequence.prefill(self.limits.prefill_tokens, self.prefixes)
        self.prefill_tokens += sequence.read_tokens - before
        if finished:
            self._after(sequence)

    def _decode(self) -> bool:
        """One token for everybody whose prompt is read."""
        active = [s for s in self.running if s.stage == "decode"]
        if not active:
            return False
        model = self.answering.model
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                tokens = torch.tensor([s.last_token for s in active], device=model.device)
                logits = model.decode_one_token(tokens, CacheRows([s.cache_in_use for s in active]))
        except Exception as error:
            for sequence in active:
                self._fail(sequence, error)
            return True
        took = time.perf_counter() - began
        self.decode_steps += 1
        for sequence, row in zip(active, logits, strict=True):
            sequence.run.decode_seconds += took
            sequence.run.decode_steps += 1
            self._guarded(sequence, lambda s=sequence, r=row: s.take(r))  # type: ignore[misc]
            self._after(sequence)
        return True

    def _after(self, sequence: Sequence) -> None:
        """Note a token, and let a sequence that is complete leave."""
        if sequence not in self.running:
            return
        if sequence.stage == "done":
            self.generated_tokens += len(sequence.growing.token_ids)
            if sequence.cache is not None:
                self.prefixes.finish(sequence.number, sequence.growing.token_ids)
            self._leave(sequence)

    def _guarded(self, sequence: Sequence, work: Callable[[], None]) -> None:
        """Do the work of one sequence; what goes wrong is its own trouble."""
        try:
            work()
        except Exception as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._leave(sequence)
        sequence.fail(error)

    def _leave(self, sequence: Sequence) -> None:
        self.pictures.leave(sequence.number)
        self.prefixes.drop(sequence.number)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.let_go()
