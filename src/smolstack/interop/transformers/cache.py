"""A transformers cache that is written in place and shared with smolstack's decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache

from smolstack.model.kv_cache import KVCache

_DynamicLayer: Any = cache_utils.DynamicLayer
STEP = 256  # minimum number of tokens by which a full buffer grows


class GrowingLayer(_DynamicLayer):  # type: ignore[misc]
    """A layer of transformers' dynamic cache that is not copied for every token.

    Keys and values are views of larger buffers, (B, kv heads, room, K), written in place.
    Everything else (cropping, reordering beams, repeating rows) is inherited from transformers.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, kv heads, T, K); return all keys and values of the layer."""
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
        end = length + new.shape[-2]
        buffer = self._room(name, new, end)
        buffer[:, :, length:end] = new
        return buffer[:, :, :end]

    def _room(self, name: str, like: Tensor, end: int) -> Tensor:
        """Return the buffer (B, kv heads, room ≥ end, K), which begins with the current contents.

        Reordered, repeated or cropped keys are separate tensors and are copied into it.
        """
        held: Tensor = getattr(self, name)
        length = held.shape[-2] if held.numel() else 0
        buffer: Tensor | None = self.__dict__.get(f"_{name}")
        moved = buffer is None or held.data_ptr() != buffer.data_ptr()
        if buffer is None or moved or buffer.shape[0] != like.shape[0] or end > buffer.shape[-2]:
            room = max(end + STEP, end + end // 4)
            buffer = like.new_empty(*like.shape[:2], room, like.shape[-1])
            if length:
                buffer[:, :, :length] = held
            self.__dict__[f"_{name}"] = buffer
        return buffer

    def reserve(self, like: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Return buffers of keys and values with room for ``end`` tokens; ``like`` is (B, kv heads,
        …, K).

        After writing into them, call :meth:`written`.
        """
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        return self._room("keys", like, end), self._room("values", like, end)

    def written(self, end: int) -> None:
        """Record that the buffers of :meth:`reserve` contain ``end`` tokens."""
        self.keys, self.values = (self.__dict__[n][:, :, :end] for n in ("_keys", "_values"))


def new_cache(layers: int) -> Cache:
    """Return an empty DynamicCache of growing layers, for smolstack's and transformers' models."""
    dynamic: Any = cache_utils.DynamicCache
    cache: Cache = dynamic()
    cache.layers = [GrowingLayer() for _ in range(layers)]
    cache.layer_class_to_replicate = None  # all layers exist
    return cache


class BorrowedCache(KVCache):
    """A transformers cache in the form that smolstack's decoder uses.

    Args:
        cache: any transformers cache whose layers return their contents (not a static one).
        padding: (B,) left-padding tokens per row, or None.
    """

    def __init__(self, cache: Cache, padding: Tensor | None) -> None:
        # No buffers of the parent class: the other cache has them.
        self.cache = cache
        self.padding = padding
        self.length = int(cache.get_seq_length())

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        held: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer)
        return held


class ReservedCache(KVCache):
    """A cache of growing layers in the form that the compiled decoder uses: complete buffers,
    written in place.

    Args:
        cache: a cache of growing layers only (see :func:`grows`).
        like: (B, kv heads, …, K) in the dtype of the keys and values.
        new: tokens that will be written, to all layers.
        padding: (B,) left-padding tokens per row, or None.
    """

    def __init__(self, cache: Cache, like: Tensor, new: int, padding: Tensor | None) -> None:
        self.padding, self.length = padding, int(cache.get_seq_length())
        self.layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
        pairs = [layer.reserve(like, self.length + new) for layer in self.layers]
        self.keys, self.values = [keys for keys, _ in pairs], [values for _, values in pairs]
        self.capacity = self.keys[0].shape[-2]

    def advance(self, tokens: int) -> None:
        """Record ``tokens`` tokens as written, once every layer has them."""
        super().advance(tokens)
        for layer in self.layers:
            layer.written(self.length)


def grows(cache: Any, layers: int) -> bool:
    """Return whether a cache has the given number of layers, all growing and of equal capacity."""
    held = getattr(cache, "layers", [])
    return len(held) == layers and all(type(layer) is GrowingLayer for layer in held)
