"""Rows of different lengths in one forward pass of the decoder, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from smolstack.model.kv_cache import RaggedKVCache


class _NoCache:
    """The KV cache of a sequence that is processed in one pass: always empty, nothing is stored."""

    length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values to attend to: those of the row itself."""
        return keys, values

    def advance(self, count: int) -> None:
        """Do nothing; a layer may be recomputed for its gradient."""


def packed_rows(lengths: Sequence[int]) -> RaggedKVCache:
    """Return the decoder's cache for packed rows (1, ΣT, D); each row attends only to itself."""
    no_cache: Any = _NoCache()
    return RaggedKVCache([no_cache] * len(lengths), lengths)
