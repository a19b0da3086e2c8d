"""Identify a model's weights by a digest of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_digest(weights: Iterable[Tensor]) -> bytes:
    """Hash the shapes, dtypes and values of weights, in order."""
    digest = hashlib.sha256()
    for weight in weights:
        values = weight.detach().cpu().contiguous()
        digest.update(repr((tuple(values.shape), values.dtype)).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.digest()
