"""A digest of weights: equal for equal values, whatever file or process they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_digest(weights: Iterable[Tensor]) -> bytes:
    """A digest of weights: shapes, number formats and values, in order."""
    digest = hashlib.sha256()
    for weight in weights:
        values = weight.detach().cpu().contiguous()
        digest.update(repr((tuple(values.shape), values.dtype)).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors made in inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
