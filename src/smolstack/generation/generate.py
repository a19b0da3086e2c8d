"""The loop: prefill a batch, then one token at a time for every sequence that is not done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch

from smolstack.batch import Batch
from smolstack.errors import ContextLengthError
from smolstack.generation.sampling import Sampler, Sampling
from smolstack.generation.stopping import FinishReason, Stopping
from smolstack.generation.stream import TextStream
from smolstack.model.cache import KVCache
from smolstack.model.vlm import VisionLanguageModel


@dataclass
class Growing:
    """One answer as it grows."""

    prompt_tokens: int
    limit: int
    sampler: Sampler
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


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


def start(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stopping: Stopping,
    decode: Callable[[Sequence[int]], str],
    max_positions: int,
) -> Run:
    """Check that every answer has room, before any work is done.

    Args:
        prompts: token ids of each sequence.
        decode: token ids → text, special tokens left out.
        max_positions: tokens that the model's context holds.

    Raises:
        ContextLengthError: a prompt leaves no room for a single new token.
    """
    sequences = []
    for prompt_ids in prompts:
        room = max_positions - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and the model's context holds "
                f"{max_positions}, which leaves no room for an answer"
            )
        sequences.append(
            Growing(
                prompt_tokens=len(prompt_ids),
                limit=min(stopping.max_new_tokens, room),
                sampler=Sampler(sampling, torch.tensor(list(prompt_ids), dtype=torch.long)),
                stream=TextStream(decode, stopping.stop),
            )
        )
    return Run(sequences)


def generate(
    model: VisionLanguageModel, batch: Batch, run: Run, stopping: Stopping, cache: KVCache
) -> Iterator[Event]:
    """Answer every sequence of a batch; yields an event per sequence and step.

    Each sequence has its own random state and limits, and finished ones leave the batch, so an
    answer does not depend on its neighbours.

    Args:
        cache: empty, or holding a prefix of the batch's only sequence; :func:`capacity` tokens.
    """
    logits = _timed(run, "prefill_seconds", lambda: model.prefill(batch, cache))
    active = list(range(len(batch)))
    while True:
        tokens = []
        for place, row in enumerate(active):
            sequence = run.sequences[row]
            token, piece = _step(sequence, logits[place], stopping)
            tokens.append(token)
            yield Event(row, piece, sequence.finish_reason)
        going = [p for p, row in enumerate(active) if run.sequences[row].finish_reason is None]
        if not going:
            return
        if len(going) < len(active):
            cache.select(torch.tensor(going, device=model.device))
            active, tokens = [active[p] for p in going], [tokens[p] for p in going]
        new = torch.tensor(tokens, device=model.device)
        logits = _timed(run, "decode_seconds", partial(model.decode_one_token, new, cache))
        run.decode_steps += 1


def capacity(batch: Batch, run: Run) -> int:
    """Tokens per sequence that a cache for these answers must hold."""
    return batch.token_ids.shape[1] + max(sequence.limit for sequence in run.sequences)


def _timed(run: Run, total: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Do ``work`` without autograd and add its seconds to a total of the run.

    Inference mode ends before anything is yielded: a generator that held it would leave it on in
    the caller's code.
    """
    began = perf_counter()
    with torch.inference_mode():
        result = work()
    setattr(run, total, getattr(run, total) + perf_counter() - began)
    return result


def _step(sequence: Growing, logits: torch.Tensor, stopping: Stopping) -> tuple[int, str]:
    """Choose one token and decide whether the answer ends with it."""
    with torch.inference_mode():
        token = sequence.sampler(logits)
    sequence.token_ids.append(token)
    if token in stopping.eos_token_ids:
        sequence.finish_reason = "stop"
        return token, sequence.stream.finish()
    piece = sequence.stream.push(token)
    if sequence.stream.stopped:
        sequence.finish_reason = "stop"
    elif stopping.repetition is not None and stopping.repetition.matches(sequence.token_ids):
        sequence.finish_reason = "repetition"
    elif len(sequence.token_ids) >= sequence.limit:
        sequence.finish_reason = "length"
    if sequence.finish_reason is not None:
        piece += sequence.stream.finish()
        if sequence.stream.stopped:
            sequence.finish_reason = "stop"
    return token, piece
