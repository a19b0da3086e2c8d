"""Rows of different lengths in one forward pass of the decoder, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from smolstack.model.kv_cache import RaggedKVCache


class _Passing:
    """What the decoder asks of a sequence's cache, without one: nothing came before."""

    length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to: those of the row itself."""
        return keys, values

    def advance(self, count: int) -> None:
        """Nothing is kept; a layer may be computed again for its gradient."""


def packed_rows(lengths: Sequence[int]) -> RaggedKVCache:
    """What tells the decoder where rows begin in (1, ΣT, D); each attends to itself alone."""
    passing: Any = _Passing()
    return RaggedKVCache([passing] * len(lengths), lengths)
