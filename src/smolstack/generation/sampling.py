"""The sampler and its parameters. Warpers and their order are those of transformers' generate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smolstack.errors import GenerationError

_LEAST = 0.0001  # smallest divisor of logits; with less they overflow


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens whose probabilities add up to p; 1 keeps all (Holtzman et
            al. 2020).
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all
            (Nguyen et al. 2024).
        repetition_penalty: logits of tokens that occur in the prompt or the answer are divided by
            it if positive and multiplied by it if negative; 1 changes nothing (Keskar et al. 2019).
        seed: for repeatable sampling; None: random.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        low = self.temperature
        _check("temperature", low, low == 0 or low >= _LEAST, f"0, or {_LEAST} or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0.01 <= penalty <= 100, "0.01 to 100")
        seed = self.seed
        _check("seed", seed, seed is None or -(2**63) <= seed < 2**64, "-2**63 to 2**64 - 1")


class Sampler:
    """Chooses tokens for one sequence, with a random state independent of the batch."""

    def __init__(self, sampling: SamplingParams, prompt_ids: Tensor) -> None:
        self.sampling = sampling
        self.seen = torch.unique(prompt_ids) if sampling.repetition_penalty != 1 else None
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """Return the next token, from logits (V,); ``allowed`` (V,) bool excludes the other
        tokens.
        """
        logits = logits.float()
        if self.seen is not None:
            self.seen = self.seen.to(logits.device)
            logits = penalize(logits, self.seen, self.sampling.repetition_penalty)
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        if self.sampling.temperature == 0:
            token = likeliest(logits)
        else:
            weights = warp(logits, self.sampling).softmax(dim=-1).cpu()
            token = int(torch.multinomial(weights, 1, generator=self.generator))
        if self.seen is not None:
            new = torch.tensor([token], device=self.seen.device)
            self.seen = torch.unique(torch.cat((self.seen, new)))
        return token


def likeliest(logits: Tensor) -> int:
    """Return the index of the largest of (V,), the first among equals."""
    if logits.device.type == "cpu":  # NumPy takes a tenth of torch's time
        return int(logits.detach().numpy().argmax())
    return int(logits.argmax())


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty to tokens that occurred before: (V,) → (V,)."""
    scores = logits[seen]
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.scatter(0, seen, scores)


def warp(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Apply temperature, top-k, top-p, min-p, in this order; dropped tokens get −inf: (V,) →
    (V,).
    """
    likeliest = logits == logits.max()
    logits = logits / sampling.temperature
    if not bool(logits.max().isfinite()):  # overflow at a very low temperature: only these remain
        logits = torch.zeros_like(logits).masked_fill(~likeliest, -torch.inf)
    if 0 < sampling.top_k < logits.numel():
        smallest_kept = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort()
        tail = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        tail[-1] = False
        logits = logits.masked_fill(tail[order.argsort()], -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        rare = probabilities < sampling.min_p * probabilities.max()
        logits = logits.masked_fill(rare, -torch.inf)
    return logits


def _check(name: str, value: float | None, ok: bool, expected: str) -> None:
    if not ok:
        raise GenerationError(f"{name} is {value}, expected {expected}")
