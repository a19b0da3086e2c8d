"""AdamW with parameter groups, and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.train.recipe import Stage
from smolstack.train.trainable import part_of

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(parameters: Mapping[str, nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """Return AdamW with groups by learning rate and weight decay.

    Weight decay applies to matrices, not to biases, norms and embeddings.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = stage.learning_rates.get(part_of(name), stage.learning_rate)
        decays = parameter.dim() > 1 and "embedding" not in name
        groups.setdefault((rate, stage.weight_decay if decays else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "lr": rate, "peak": rate, "weight_decay": decay}
            for (rate, decay), group in groups.items()
        ],
        betas=(stage.betas[0], stage.betas[1]),
    )


def set_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int, steps: int) -> float:
    """Set every group's learning rate for step ``step`` (from 0) of ``steps``; return the
    highest.
    """
    factor = rate_factor(stage, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)


def rate_factor(stage: Stage, step: int, steps: int) -> float:
    """Linear from nearly 0 to 1 during warm-up, then a cosine down to ``final_rate``."""
    if step < stage.warmup:
        return (step + 1) / (stage.warmup + 1)
    progress = (step - stage.warmup) / max(1, steps - stage.warmup)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the optimizer state as tensors named "weight|moment"; shards stay shards."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state: Mapping[str, Any] = optimizer.state.get(parameter, {})
        found.update({f"{name}|{kind}": state[kind] for kind in MOMENTS if kind in state})
    return found


def restore_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
) -> None:
    """Restore optimizer state returned by :func:`moments` (already sharded like the weights)."""
    for name, parameter in parameters.items():
        state = {kind: saved[key] for kind in MOMENTS if (key := f"{name}|{kind}") in saved}
        if state:
            optimizer.state[parameter] = state
