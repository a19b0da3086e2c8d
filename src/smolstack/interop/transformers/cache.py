"""transformers' cache, written in place, and seen by smolstack's decoder as its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache

from smolstack.model.cache import KVCache

_DynamicLayer: Any = cache_utils.DynamicLayer
STEP = 256  # tokens of room that a full buffer grows by, at least


class GrowingLayer(_DynamicLayer):  # type: ignore[misc]
    """A layer of transformers' dynamic cache that does not copy itself for every token.

    Keys and values are views of larger buffers, (B, kv heads, room, K), written in place. All else
    (cropping, reordering beams, repeating rows) is transformers' own.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, kv heads, T, K); all that the layer now holds."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        held: Tensor = getattr(self, name)
        length = held.shape[-2] if held.numel() else 0
        if torch.is_grad_enabled() and new.requires_grad:
            return new if length == 0 else torch.cat((held, new), dim=-2)
        buffer: Tensor | None = self.__dict__.get(f"_{name}")
        end = length + new.shape[-2]
        moved = buffer is None or held.data_ptr() != buffer.data_ptr()
        if buffer is None or moved or buffer.shape[0] != new.shape[0] or end > buffer.shape[-2]:
            room = max(end + STEP, end + end // 4)
            buffer = new.new_empty(*new.shape[:2], room, new.shape[-1])
            if length:
                buffer[:, :, :length] = held
            self.__dict__[f"_{name}"] = buffer
        buffer[:, :, length:end] = new
        return buffer[:, :, :end]


def new_cache(layers: int) -> Cache:
    """An empty cache of growing layers, for smolstack's and for transformers' own models."""
    return Cache(layers=[GrowingLayer() for _ in range(layers)])


class BorrowedCache(KVCache):
    """A transformers cache as smolstack's decoder wants it.

    Args:
        cache: any cache of transformers whose layers return what they hold (not a static one).
        padding: (B,) left-padding tokens per row, or None.
    """

    def __init__(self, cache: Cache, padding: Tensor | None) -> None:
        # None of the parent's buffers: the other cache keeps them.
        self.cache = cache
        self.padding = padding
        self.length = int(cache.get_seq_length())

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        held: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer)
        return held
