"""Divergence between the next-token distributions of two models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smolstack.errors import CheckpointError

ROWS = 128  # at once, to limit memory


@dataclass
class Divergence:
    """Sums over tokens, from which means are computed.

    Attributes:
        tokens: positions compared.
        divergence: KL(expected ‖ found) (Kullback and Leibler 1951), in nats.
        same: positions with the same most likely token.
        surprise: -log of the found probability of the following token, in nats.
    """

    tokens: int = 0
    divergence: float = 0.0
    same: int = 0
    surprise: float = 0.0

    def add(self, expected: Tensor, found: Tensor, targets: Tensor) -> None:
        """Add a comparison of logits.

        Args:
            expected, found: (T, V) logits of the same positions.
            targets: (T,) the token that follows each position.

        Raises:
            CheckpointError: shapes differ, or a logit is NaN.
        """
        if expected.shape != found.shape or targets.shape != expected.shape[:1]:
            raise CheckpointError(
                f"logits have shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
            )
        for start in range(0, len(targets), ROWS):
            part = slice(start, start + ROWS)
            reference = functional.log_softmax(expected[part].float(), dim=-1)
            other = functional.log_softmax(found[part].float(), dim=-1)
            if not bool(torch.isfinite(other.amax(dim=-1)).all()):
                raise CheckpointError(
                    f"logits of positions {start} to {start + ROWS} are not finite"
                )
            gap = reference.exp() * (reference - other)
            self.divergence += float(gap.sum(dtype=torch.float64))
            self.same += int((reference.argmax(dim=-1) == other.argmax(dim=-1)).sum())
            following = targets[part, None].to(other.device)
            self.surprise -= float(other.gather(1, following).sum(dtype=torch.float64))
        self.tokens += len(targets)

    @property
    def mean(self) -> float:
        """KL(expected ‖ found) per token, in nats; at least 0 despite rounding."""
        return max(0.0, self.divergence / self.tokens)

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return self.same / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise."""
        return math.exp(self.surprise / self.tokens)
