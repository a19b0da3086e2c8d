"""Muon in the precision of the weights: torch's own works in bfloat16.

A processor without bfloat16 emulates it twenty times more slowly, which would cost more than
all the rest of a step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steep at zero (Jordan et al. 2024)
ITERATIONS = 5
UPDATE = 0.2  # root mean square of an update that AdamW makes (Liu et al. 2025)


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal factor of each matrix's momentum (Jordan et al. 2024).

    Updates are as large as AdamW's, so that both take the same rate.

    Args:
        params: groups of matrices.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; a group's ``lr`` is read anew each time."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for weights in alike.values():
                self._step_alike(weights, group)

    def _step_alike(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices of one shape: a GPU takes them all at once."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momentum = [self.state[weight]["momentum"] for weight in weights]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_mul_(momentum, group["momentum"])
        torch._foreach_add_(momentum, gradients)
        ahead = torch._foreach_add(gradients, momentum, alpha=group["momentum"])
        updates = orthogonal(torch.stack(ahead))
        scale = UPDATE * math.sqrt(max(weights[0].shape))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices, (..., rows, columns), whose singular values are all about one.

    By Newton and Schulz.
    """
    first, second, third = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = first * found + (second * gram + third * gram @ gram) @ found
    nearest: Tensor = found.mT if tall else found
    return nearest
