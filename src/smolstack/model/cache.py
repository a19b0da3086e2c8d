"""The key/value cache of one batch of sequences: written once per token, never copied."""

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

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, (R,) int64, in that order."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        if self.padding is not None:
            self.padding = self.padding.index_select(0, rows)

    def begin_with(self, beginning: KVCache, kept: Sequence[int]) -> None:
        """Hold the first ``kept[row]`` tokens of the only sequence of ``beginning`` in each row of
        this empty cache, as many more before them being padding as the row needs."""
        self.length = max(kept)
        for own, held in ((self.keys, beginning.keys), (self.values, beginning.values)):
            for to, source in zip(own, held, strict=True):
                for row, count in enumerate(kept):
                    to[row, :, : self.length - count] = 0  # masked, but read by torch's attention
                    to[row, :, self.length - count : self.length] = source[0, :, :count]

    def forked(self, capacity: int) -> KVCache:
        """All sequences in a new cache with room for ``capacity``, to go on without this one."""
        fork = object.__new__(KVCache)
        fork.keys = [_grown(keys, self.length, capacity) for keys in self.keys]
        fork.values = [_grown(values, self.length, capacity) for values in self.values]
        fork.padding, fork.capacity, fork.length = self.padding, capacity, self.length
        return fork

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values held, without the room that is left."""
        batch, heads, _, width = self.keys[0].shape
        size = self.keys[0].element_size()
        return 2 * len(self.keys) * batch * heads * self.length * width * size

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
        return copy


class CacheRows:
    """Caches of B sequences that are of different lengths, for one token of each.

    Sequences join and leave by being in the list or not: nothing is padded, moved or copied, and
    the attention of one does not know of the others.

    Args:
        caches: one per sequence, each made for a batch of 1 without padding.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = list(caches)
        lengths = [cache.length for cache in self.caches]
        self.length = max(lengths)
        # Positions are counted from the longest, so a shorter one is padded in name alone.
        self.padding = torch.tensor([self.length - length for length in lengths])

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as written in every sequence."""
        for cache in self.caches:
            cache.advance(tokens)
        self.length += tokens


def _grown(buffer: Tensor, length: int, capacity: int) -> Tensor:
    batch, heads, _, width = buffer.shape
    larger = buffer.new_empty(batch, heads, capacity, width)
    larger[:, :, :length] = buffer[:, :, :length]
    return larger
