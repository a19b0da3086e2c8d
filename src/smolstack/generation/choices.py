"""Which of several texts the answer is: the probability of each, read off, not sampled.

The prompt is read once; the choices follow it side by side (teacher forcing), each with the token
that ends it, so that "1" and "11" are two different answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from smolstack.errors import ContextLengthError
from smolstack.generation.sampling import Sampling
from smolstack.model.cache import KVCache
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor, Prompt

_COPIED_BYTES = 256 * 2**20  # of the prompt's cache, for the choices read side by side
_TOKENS = 512  # of choices read in one pass, padding included


def continuations(
    processor: Processor,
    prompt: Prompt,
    lead: str,
    texts: Sequence[str],
    eos_token_ids: Sequence[int],
) -> list[tuple[int, ...]]:
    """Token ids of each choice after the prompt, tokenized where it stands, its end included.

    Raises:
        ContextLengthError: a choice does not fit behind the prompt.
    """
    end = tuple(eos_token_ids[:1])
    room = processor.config.text.max_positions - len(prompt.token_ids)
    found = []
    for text in texts:
        whole = tuple(processor.tokenizer.encode(prompt.text + lead + text))
        if whole[: len(prompt.token_ids)] == prompt.token_ids:
            ids = whole[len(prompt.token_ids) :]
        else:
            ids = tuple(processor.tokenizer.encode(lead + text, special=False))
        if len(ids) + len(end) > room:
            raise ContextLengthError(
                f"the choice {text!r:.40} has {len(ids)} tokens, the prompt leaves room for {room}"
            )
        found.append(ids + end)
    return found


def score(
    model: VisionLanguageModel,
    logits: Tensor,
    cache: KVCache,
    choices: Sequence[Sequence[int]],
    tokens: int = _TOKENS,
) -> Iterator[list[float]]:
    """Log-probabilities of whole choices after a prompt, a bounded piece of work per step.

    Args:
        logits: (V,) after the prompt.
        cache: holds the prompt of one sequence; it is left as it was.
        choices: token ids of each.
        tokens: read in one step at most, padding included.

    Yields:
        Natural logarithms of the joint probability of a choice's tokens, in order, for as many
        choices as that step completed (none, in the midst of a long one).
    """
    first = logits.float().log_softmax(dim=-1)
    most = max(1, _COPIED_BYTES // max(cache.held_bytes, 1))
    for some in _side_by_side(choices, most, tokens):
        totals = [float(first[ids[0]]) for ids in some]
        for later in _later(model, cache, some, tokens):
            yield []
            totals = [a + b for a, b in zip(totals, later, strict=True)]
        yield totals


def _side_by_side(
    choices: Sequence[Sequence[int]], rows: int, tokens: int
) -> Iterator[list[Sequence[int]]]:
    """Neighbours that fit into one pass; a choice that does not fit into one is alone."""
    some: list[Sequence[int]] = []
    for ids in choices:
        longest = max(len(each) for each in [*some, ids])
        if some and (len(some) == rows or (len(some) + 1) * longest > tokens):
            yield some
            some = []
        some.append(ids)
    yield some


def _later(
    model: VisionLanguageModel, cache: KVCache, choices: Sequence[Sequence[int]], tokens: int
) -> Iterator[list[float]]:
    """Log-probabilities of the tokens of each choice but its first: those of one pass per step."""
    longest = max(len(ids) for ids in choices) - 1
    fed = torch.zeros(len(choices), longest, dtype=torch.long)
    wanted = torch.zeros_like(fed)
    real = torch.zeros_like(fed, dtype=torch.bool)
    for row, ids in enumerate(choices):
        known = len(ids) - 1
        fed[row, :known] = torch.tensor(ids[:-1])
        wanted[row, :known] = torch.tensor(ids[1:])
        real[row, :known] = True
    # Padding stands on the right, where nothing that counts can see it.
    beside = cache.copied(len(choices), cache.length + longest) if longest else cache
    width = max(1, tokens // len(choices))
    for start in range(0, longest, width):
        part = slice(start, start + width)
        with torch.inference_mode():
            embeddings = model.decoder.embedding(fed[:, part].to(model.device))
            scores = model.read(embeddings, beside, every=True).float().log_softmax(dim=-1)
            taken = scores.gather(2, wanted[:, part].to(model.device)[..., None])[..., 0].cpu()
        yield [float(row[keep].sum()) for row, keep in zip(taken, real[:, part], strict=True)]


def probabilities(log_probabilities: Sequence[float]) -> list[float]:
    """Shares of each choice, given that the answer is one of them; they sum to 1."""
    highest = max(log_probabilities)
    weights = [math.exp(value - highest) for value in log_probabilities]
    total = sum(weights)
    return [weight / total for weight in weights]


def pick(log_probabilities: Sequence[float], sampling: Sampling) -> int:
    """The likeliest choice, or one drawn at the sampling's temperature."""
    if sampling.temperature == 0:
        return max(range(len(log_probabilities)), key=lambda place: log_probabilities[place])
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    scores = torch.tensor(log_probabilities, dtype=torch.float64) / sampling.temperature
    return int(torch.multinomial(scores.softmax(dim=0), 1, generator=generator))
