"""The loop: prefill a batch, then one token at a time for every sequence that is not done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch

from smolstack.batch import Batch
from smolstack.errors import ContextLengthError
from smolstack.generation.answer import TokenLogprob
from smolstack.generation.options import ReadOptions
from smolstack.generation.sampling import Sampler
from smolstack.generation.stopping import FinishReason, Stopping
from smolstack.generation.stream import TextStream
from smolstack.generation.structured import Constraint
from smolstack.model.cache import KVCache
from smolstack.model.vlm import VisionLanguageModel


@dataclass
class Growing:
    """One answer as it grows.

    Attributes:
        constraint: the form that it must keep to, or None.
        top_logprobs: likeliest tokens noted at each place; None notes nothing.
    """

    prompt_tokens: int
    limit: int
    sampler: Sampler
    stream: TextStream
    stopping: Stopping
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _handed_out: int = 0  # characters, the lead not counted
    _lead_left: int = -1  # characters of the lead that are still to come

    def take(self, logits: torch.Tensor) -> tuple[int, str]:
        """Choose one token from logits (V,) and decide whether the answer ends with it.

        Returns:
            The token, and the characters of the answer that became certain.
        """
        with torch.inference_mode():
            allowed = None if self.constraint is None else self.constraint.allowed()
            token = self.sampler(logits, allowed)
            if self.top_logprobs is not None:
                self.logprobs.append(_logprob(logits, token, self.top_logprobs))
        self.token_ids.append(token)
        if self.constraint is not None:
            self.constraint.take(token)
        return token, self._after_lead(self._push(token))

    def take_all(self, token_ids: Sequence[int]) -> str:
        """Take a whole answer that was chosen otherwise; its text."""
        self.token_ids.extend(token_ids)
        text = "".join(self.stream.push(t) for t in token_ids if t not in self._ends)
        self.finish_reason = "stop"
        return self._after_lead(text + self.stream.finish())

    @property
    def text(self) -> str:
        """The answer so far: without surrounding white space, or exactly as its form has it."""
        if self.constraint is None:
            return self.stream.text.strip()
        return self.stream.text[self.constraint.lead :]

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.stopping.eos_token_ids

    def _push(self, token: int) -> str:
        if token in self._ends:
            self.finish_reason = "stop"
            return self.stream.finish()
        piece = self.stream.push(token)
        if self.stream.stopped or (self.constraint is not None and self.constraint.complete):
            self.finish_reason = "stop"
        elif self.stopping.repetition is not None and self.stopping.repetition.matches(
            self.token_ids
        ):
            self.finish_reason = "repetition"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"
        return piece

    def _after_lead(self, piece: str) -> str:
        """A piece without what the template leaves between prompt and answer to the model."""
        if self.constraint is None:
            piece = piece if self._handed_out else piece.lstrip()
        else:
            left = self.constraint.lead if self._lead_left < 0 else self._lead_left
            self._lead_left = max(0, left - len(piece))
            piece = piece[left:]
        self._handed_out += len(piece)
        return piece


@dataclass(frozen=True)
class Event:
    """One step of one sequence: the characters that became certain, maybe none."""

    row: int
    piece: str
    finish_reason: FinishReason | None


@dataclass
class Run:
    """The sequences of a batch and what their generation took, in seconds."""

    sequences: list[Growing]
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0


def begin(
    token_ids: Sequence[int],
    options: ReadOptions,
    decode: Callable[[Sequence[int]], str],
    max_positions: int,
    constraint: Constraint | None = None,
) -> Growing:
    """An answer that has not begun; checks that it has room, before any work is done.

    Args:
        token_ids: the prompt's.
        decode: token ids → text.
        max_positions: tokens that the model's context holds.
        constraint: the form of this answer alone.

    Raises:
        ContextLengthError: the prompt leaves no room for a single new token.
    """
    room = max_positions - len(token_ids)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(token_ids)} tokens and the model's context holds "
            f"{max_positions}, which leaves no room for an answer"
        )
    return Growing(
        prompt_tokens=len(token_ids),
        limit=min(options.stopping.max_new_tokens, room),
        sampler=Sampler(options.sampling, torch.tensor(list(token_ids), dtype=torch.long)),
        stream=TextStream(decode, options.stopping.stop),
        stopping=options.stopping,
        constraint=constraint,
        top_logprobs=options.logprobs,
    )


def generate(model: VisionLanguageModel, batch: Batch, run: Run, cache: KVCache) -> Iterator[Event]:
    """Answer every sequence of a batch; yields an event per sequence and step.

    Each sequence has its own random state and limits, and finished ones leave the batch, so an
    answer does not depend on its neighbours.

    Args:
        cache: empty, or holding the beginning of every sequence; :func:`capacity` tokens.
    """
    logits = timed(run, "prefill_seconds", lambda: model.prefill(batch, cache))
    active = list(range(len(batch)))
    while True:
        tokens = []
        for place, row in enumerate(active):
            sequence = run.sequences[row]
            token, piece = sequence.take(logits[place])
            tokens.append(token)
            yield Event(row, piece, sequence.finish_reason)
        going = [p for p, row in enumerate(active) if run.sequences[row].finish_reason is None]
        if not going:
            return
        if len(going) < len(active):
            cache.select(torch.tensor(going, device=model.device))
            active, tokens = [active[p] for p in going], [tokens[p] for p in going]
        new = torch.tensor(tokens, device=model.device)
        logits = timed(run, "decode_seconds", partial(model.decode_one_token, new, cache))
        run.decode_steps += 1


def capacity(batch: Batch, run: Run) -> int:
    """Tokens per sequence that a cache for these answers must hold."""
    return batch.token_ids.shape[1] + max(sequence.limit for sequence in run.sequences)


def timed(run: Run, total: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Do ``work`` without autograd and add its seconds to a total of the run.

    Inference mode ends before anything is yielded: a generator that held it would leave it on in
    the caller's code.
    """
    began = perf_counter()
    with torch.inference_mode():
        result = work()
    setattr(run, total, getattr(run, total) + perf_counter() - began)
    return result


def _logprob(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """What the model itself gave a token and its likeliest rivals, before any warping."""
    scores = logits.float().log_softmax(dim=-1)
    best = scores.topk(min(top, scores.numel()))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(scores[token]), tuple(pairs))
