"""The key/value cache of one batch of sequences: written once per token, never copied."""

from __future__ import annotations

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


def _grown(buffer: Tensor, length: int, capacity: int) -> Tensor:
    batch, heads, _, width = buffer.shape
    larger = buffer.new_empty(batch, heads, capacity, width)
    larger[:, :, :length] = buffer[:, :, :length]
    return larger
