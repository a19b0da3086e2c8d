"""KV caches: preallocated keys and values of every layer, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolstack.config import TextConfig
from smolstack.errors import ContextLengthError


class KVCache:
    """Keys and values of every layer, in buffers allocated when the cache is created.

    Args:
        config: the decoder's sizes.
        batch: B.
        capacity: maximum number of tokens (prompt and answer together).
        padding: (B,) int64, left-padding tokens of each row, which are masked out; None if
            there are none (attention then needs no mask).
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
        """Write (B, kv heads, T, K) at the end of one layer and return views of all its tokens.

        Raises:
            ContextLengthError: the tokens do not fit in the capacity.
        """
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ContextLengthError(f"{end} tokens do not fit in a KV cache for {self.capacity}")
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Add ``tokens`` to the length, after every layer has appended them."""
        self.length += tokens

    def reserve(self, capacity: int) -> None:
        """Ensure room for ``capacity`` tokens. Growing allocates new buffers and copies the
        contents.
        """
        if capacity <= self.capacity:
            return
        self.keys = [_grown(keys, self.length, capacity) for keys in self.keys]
        self.values = [_grown(values, self.length, capacity) for values in self.values]
        self.capacity = capacity

    def truncate(self, length: int) -> None:
        """Drop all but the first ``length`` tokens, such as a shared prefix."""
        self.length = min(self.length, length)

    @property
    def addresses(self) -> tuple[list[int], list[int]]:
        """Addresses of the key and value buffers, per layer. Cached: they are read before every
        token.
        """
        first = self.keys[0]
        if self._addresses is None or self._addresses[0] is not first:
            keys, values = ([part.data_ptr() for part in held] for held in (self.keys, self.values))
            self._addresses = first, keys, values
        return self._addresses[1:]

    @property
    def held_bytes(self) -> int:
        """Bytes of the cached keys and values, without unused capacity."""
        return self.token_bytes * self.length

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the buffers, including unused capacity."""
        return self.token_bytes * self.capacity

    @property
    def token_bytes(self) -> int:
        """Bytes of one token position, summed over the sequences of the batch."""
        batch, heads, _, width = self.keys[0].shape
        return 2 * len(self.keys) * batch * heads * width * self.keys[0].element_size()

    def copied(self, capacity: int, length: int | None = None) -> KVCache:
        """Return a cache with a copy of the first ``length`` tokens (None: all) of the only
        sequence, and room for ``capacity`` tokens.
        """
        kept = self.length if length is None else length
        copy = object.__new__(KVCache)
        copy.keys = [_grown(keys, kept, capacity) for keys in self.keys]
        copy.values = [_grown(values, kept, capacity) for values in self.values]
        copy.padding, copy.capacity, copy.length = None, capacity, kept
        copy._addresses = None
        return copy


class RaggedKVCache:
    """KV caches of R sequences of different lengths, for one forward pass over new tokens of each.

    The new tokens are concatenated along the token axis, (1, ΣT, D), sequence by sequence. Adding
    or removing a sequence changes only the list of caches. There is no padding, and each sequence
    attends only to its own cache.

    Args:
        caches: one per sequence, each made for a batch of 1 without padding.
        counts: number of new tokens of each sequence; None means one each.
    """

    padding: None = None

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int] | None = None) -> None:
        self.caches = list(caches)
        self.counts = [1] * len(self.caches) if counts is None else list(counts)

    def advance(self) -> None:
        """Add the new tokens to the length of every sequence."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.advance(count)

    def positions(self) -> Tensor:
        """Positions of the new tokens, (ΣT,) int64."""
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
