"""Several processes train one model, one core each: threads share so small a model's work badly.

Each takes batches of its own, and all step by the mean of their gradients. Started by
``torchrun --nproc-per-node 2 -m training.reader.train``; without torchrun there is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed, nn


def join() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return distributed.get_rank(), distributed.get_world_size()


def leave() -> None:
    """Part from the other processes, if there are any."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(joined)
    joined /= distributed.get_world_size()
    parts = torch.split(joined, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
