"""Building blocks shared by the vision tower and the decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
    "silu": functional.silu,
}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads·K) → (B, heads, T, K), a view."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, K) → (B, T, heads·K)."""
    batch, heads, length, width = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * width)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization over the last axis (Zhang & Sennrich 2019), no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)


class Embedding(nn.Embedding):
    """An embedding table that is not initialized on the meta device.

    Random initialization there would make torch import its compiler, which takes seconds.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class TokenEmbedding(Embedding):
    """Token embeddings, (…) → (…, D).

    Attributes:
        output_dtype: dtype of the returned embeddings; None means the dtype of the table.
    """

    output_dtype: torch.dtype | None = None

    def forward(self, token_ids: Tensor) -> Tensor:
        found = super().forward(token_ids)
        return found if self.output_dtype is None else found.to(self.output_dtype)
