"""What a prompt begins with is read once: the KV cache of the last conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from smolstack.batch import VisualTokens
from smolstack.model.cache import KVCache

# A token as the prefix cache compares it: an id, or a visual token (its picture's tensor, place).
TokenKey: TypeAlias = "int | tuple[int, int]"


class PrefixCache:
    """The KV cache of the last conversation, for a prompt that begins as it did.

    The next turn of a chat, or another question about the same picture, then reads only its new
    tokens. One conversation at a time uses it: taking the cache removes it until it is put back.
    """

    def __init__(self) -> None:
        self._entry: tuple[list[TokenKey], KVCache, list[torch.Tensor]] | None = None

    def take(self, keys: Sequence[TokenKey], capacity: int) -> KVCache | None:
        """A cache that holds the longest common prefix, with room for ``capacity`` tokens.

        At least the last token of the prompt is left to be read, for its logits.
        """
        if self._entry is None:
            return None
        known, cache, _ = self._entry
        self._entry = None
        limit = min(len(known), len(keys) - 1, cache.length)
        shared = next((i for i in range(limit) if known[i] != keys[i]), limit)
        if shared == 0:
            return None
        cache.truncate(shared)
        cache.reserve(capacity)
        return cache

    def put(
        self, keys: Sequence[TokenKey], cache: KVCache, pictures: Sequence[torch.Tensor]
    ) -> None:
        """Keep a cache for the tokens ``keys``; ``pictures`` are kept alive with it, so that the
        identity of a tensor in ``keys`` stays its own."""
        self._entry = (list(keys[: cache.length]), cache, list(pictures))

    def clear(self) -> None:
        """Forget the conversation."""
        self._entry = None


def token_keys(
    token_ids: Sequence[int], image_token_id: int, pictures: Sequence[VisualTokens]
) -> list[TokenKey]:
    """Keys of a prompt's tokens, its visual tokens named by their picture's tensor and place."""
    visual = ((id(v.tokens), place) for v in pictures for place in range(len(v)))
    return [next(visual) if token == image_token_id else token for token in token_ids]
