"""Answers that are one of several given texts: computes the probability of each exactly.

The prompt is read once, followed by each choice (teacher forcing) in parallel. The token that ends
the answer is included, so that "1" and "11" are different answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolstack.errors import ContextLengthError, GenerationError
from smolstack.generation.sampling import SamplingParams
from smolstack.model.kv_cache import KVCache
from smolstack.processor.processor import Processor, Prompt

_COPIED_BYTES = 256 * 2**20  # copies of the prompt's cache, one per choice of a pass
SCORED_TOKENS = 512  # per pass, unless prefill passes are limited


def continuations(
    processor: Processor,
    prompt: Prompt,
    lead: str,
    texts: Sequence[str],
    eos_token_ids: Sequence[int],
    *,
    shown: Callable[[Sequence[int]], str],
) -> list[tuple[int, ...]]:
    """Return the token ids of each choice as it is tokenized after the prompt, including the end
    token.

    Args:
        shown: token ids → the text of an answer with these tokens.

    Raises:
        ContextLengthError: a choice does not fit into the context after the prompt.
        GenerationError: a choice contains tokens that do not appear in an answer's text.
    """
    end = tuple(eos_token_ids[:1])
    room = processor.config.text.max_positions - len(prompt.token_ids)
    found = []
    for text in texts:
        whole = tuple(processor.encode_after(prompt, lead + text))
        if whole[: len(prompt.token_ids)] == prompt.token_ids:
            ids = whole[len(prompt.token_ids) :]
        else:
            ids = tuple(processor.tokenizer.encode(lead + text, special=False))
        if shown(ids) != processor.tokenizer.decode(ids, skip_special=False):
            raise GenerationError(
                f"the choice {text!r:.40} contains special tokens, which answers do not contain"
            )
        if len(ids) + len(end) > room:
            raise ContextLengthError(
                f"the choice {text!r:.40} has {len(ids)} tokens, but the context has room for "
                f"{room}"
            )
        found.append(ids + end)
    return found


@dataclass(frozen=True)
class ScoringPass:
    """A forward pass over some choices after the prompt.

    Attributes:
        rows: indices of the choices.
        start, end: range of their tokens; a shorter choice has fewer, or none.
    """

    rows: tuple[int, ...]
    start: int
    end: int


class Scoring:
    """The state of scoring the choices of one request, in passes of bounded size.

    Args:
        choices: token ids of each.
        logits: (V,) after the prompt.
        held_bytes: size of the prompt's KV cache, which is copied for every choice of a pass.
        tokens: maximum number of tokens per pass.

    Attributes:
        totals: log-probability of each choice's tokens scored so far.
        copies: KV caches of the choices of the current pass; used by the runner.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        logits: Tensor,
        held_bytes: int,
        tokens: int,
    ) -> None:
        self.choices = [list(ids) for ids in choices]
        first = logits.float().log_softmax(dim=-1)
        self.totals = [float(first[ids[0]]) for ids in self.choices]
        self.copies: dict[int, KVCache] = {}
        most = max(1, _COPIED_BYTES // max(held_bytes, 1))
        self._passes = list(_passes(self.choices, most, tokens))

    @property
    def complete(self) -> bool:
        return not self._passes

    @property
    def next_pass(self) -> ScoringPass:
        return self._passes[0]

    def fed(self, row: int) -> list[int]:
        """Return the input tokens of a choice for the next pass."""
        step = self._passes[0]
        return self.choices[row][:-1][step.start : step.end]

    def wanted(self, row: int) -> list[int]:
        """Return the target tokens: those that follow the input tokens."""
        step = self._passes[0]
        return self.choices[row][1:][step.start : step.end]

    def add(self, sums: Mapping[int, float]) -> None:
        """Add the results of a pass: the summed log-probabilities of the target tokens."""
        for row, value in sums.items():
            self.totals[row] += value
        del self._passes[0]


def _passes(choices: Sequence[Sequence[int]], rows: int, tokens: int) -> Iterator[ScoringPass]:
    """Yield passes of adjacent choices that fit; a choice that is too large is a pass of its
    own.
    """
    some: list[int] = []
    for row, ids in enumerate(choices):
        longest = max(len(choices[each]) for each in [*some, row])
        if some and (len(some) == rows or (len(some) + 1) * longest > tokens):
            yield from _parts(choices, some, tokens)
            some = []
        if len(ids) > 1:  # the first token's probability is known from the prompt
            some.append(row)
    if some:
        yield from _parts(choices, some, tokens)


def _parts(
    choices: Sequence[Sequence[int]], some: Sequence[int], tokens: int
) -> Iterator[ScoringPass]:
    longest = max(len(choices[row]) for row in some) - 1
    width = max(1, tokens // len(some))
    for start in range(0, longest, width):
        yield ScoringPass(tuple(some), start, min(start + width, longest))


def probabilities(log_probabilities: Sequence[float]) -> list[float]:
    """Return the probability of each choice, given that the answer is one of them; they sum
    to 1.
    """
    highest = max(log_probabilities)
    weights = [math.exp(value - highest) for value in log_probabilities]
    total = sum(weights)
    return [weight / total for weight in weights]


def pick(log_probabilities: Sequence[float], sampling: SamplingParams) -> int:
    """Return the most likely choice, or one sampled at the temperature."""
    if sampling.temperature == 0:
        return max(range(len(log_probabilities)), key=lambda place: log_probabilities[place])
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    scores = torch.tensor(log_probabilities, dtype=torch.float64) / sampling.temperature
    return int(torch.multinomial(scores.softmax(dim=0), 1, generator=generator))
