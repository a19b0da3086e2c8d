"""Muon in the precision of the weights: torch's own works in bfloat16.

A processor without bfloat16 emulates it twenty times more slowly, which would cost more than
all the rest of a step.
"""

from __future__ import annotations

import math
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
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                ahead = weight.grad + group["momentum"] * state["momentum"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                scale = UPDATE * math.sqrt(max(weight.shape))
                weight.sub_(orthogonal(ahead), alpha=group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about one, by Newton and Schulz."""
    first, second, third = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, second * gram + third * gram @ gram, found, beta=first)
    return found.T if tall else found
