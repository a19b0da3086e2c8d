"""KV caches: the keys and values of every layer, in buffers that are written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolstack.config import TextConfig
from smolstack.errors import ContextLengthError


class KVCache:
    """Keys and values of every layer, in buffers sized when it is made.

    Args:
        config: the decoder's sizes.
        batch: B.
        capacity: most tokens (prompt and answer together) that it can hold.
        padding: (B,) int64, left-padding tokens of each row, which nobody attends to; None when
            there are none (then attention needs no mask).
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        *,
        padding: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.capacity, self.length = capacity, 0
        self._addresses: tuple[Tensor, list[int], list[int]] | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, kv heads, T, K) at the end of one layer; views of all that it now holds."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ContextLengthError(f"{end} tokens in a cache made for {self.capacity}")
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as written, once every layer has appended them."""
        self.length += tokens

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens; what is held is copied if the buffers must grow."""
        if capacity <= self.capacity:
            return
        self.keys = [_grown(keys, self.length, capacity) for keys in self.keys]
        self.values = [_grown(values, self.length, capacity) for values in self.values]
        self.capacity = capacity

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens (a shared prefix is kept this way)."""
        self.length = min(self.length, length)

    @property
    def addresses(self) -> tuple[list[int], list[int]]:
        """Where the buffers of keys and of values begin, layer by layer; asked before every
        token."""
        first = self.keys[0]
        if self._addresses is None or self._addresses[0] is not first:
            keys, values = ([part.data_ptr() for part in held] for held in (self.keys, self.values))
            self._addresses = first, keys, values
        return self._addresses[1:]

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values held, without the room that is left."""
        return self.token_bytes * self.length

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the buffers, with the room that is left."""
        return self.token_bytes * self.capacity

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in every sequence together."""
        batch, heads, _, width = self.keys[0].shape
        return 2 * len(self.keys) * batch * heads * width * self.keys[0].element_size()

    def copied(self, rows: int, capacity: int, length: int | None = None) -> KVCache:
        """The first ``length`` tokens (None: all) of the only sequence, ``rows`` times over, in a
        new cache with room for ``capacity``."""
        kept = self.length if length is None else length
        copy = object.__new__(KVCache)
        copy.keys = [_grown(keys.expand(rows, -1, -1, -1), kept, capacity) for keys in self.keys]
        copy.values = [
            _grown(held.expand(rows, -1, -1, -1), kept, capacity) for held in self.values
        ]
        copy.padding, copy.capacity, copy.length = None, capacity, kept
        copy._addresses = None
        return copy


class RaggedKVCache:
    """KV caches of R sequences that are of different lengths, for a pass over new tokens of each.

    The new tokens stand side by side, (1, ΣT, D), those of one sequence after those of another.
    Sequences join and leave by being in the list or not: nothing is padded, moved or copied, and
    the attention of one does not know of the others.

    Args:
        caches: one per sequence, each made for a batch of 1 without padding.
        counts: new tokens of each; None is one of each.
    """

    padding: None = None

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int] | None = None) -> None:
        self.caches = list(caches)
        self.counts = [1] * len(self.caches) if counts is None else list(counts)

    def advance(self) -> None:
        """Count the new tokens as written in every sequence."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.advance(count)

    def positions(self) -> Tensor:
        """Of the new tokens, (ΣT,) int64."""
        starts = [cache.length for cache in self.caches]
        if all(count == 1 for count in self.counts):
            return torch.tensor(starts)
        pairs = zip(starts, self.counts, strict=True)
        return torch.cat([torch.arange(start, start + count) for start, count in pairs])


def _grown(buffer: Tensor, length: int, capacity: int) -> Tensor:
    batch, heads, _, width = buffer.shape
    larger = buffer.new_empty(batch, heads, capacity, width)
    larger[:, :, :length] = buffer[:, :, :length]
    return larger
