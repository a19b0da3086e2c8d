"""Prompt beginnings that several sequences share: read once, copied for whoever comes later."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from smolstack.generation.reuse import TokenKey
from smolstack.model.cache import KVCache

_MOST = 64  # finished sequences looked through for every newcomer


class PrefixPool:
    """KV caches of sequences at work and of those that finished last, up to ``max_bytes``.

    A cache only ever grows at its end, so the beginning of one at work can be copied at any time.

    Args:
        max_bytes: of finished sequences; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.reused_tokens = 0
        self._working: dict[int, _Held] = {}
        self._finished: OrderedDict[int, _Held] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes of finished sequences' caches, room that is left included."""
        return sum(held.bytes for held in self._finished.values())

    def longest(self, keys: Sequence[TokenKey], capacity: int) -> KVCache | None:
        """A new cache that begins with the longest known part of ``keys``, or None.

        At least the last token of the prompt is left to be read, for its logits.
        """
        best, shared = None, 0
        for group in (self._working, self._finished):
            for number, held in group.items():
                common = held.common(keys)
                if common > shared:
                    best, shared = (group, number, held), common
        if best is None:
            return None
        group, number, held = best
        if group is self._finished:
            self._finished.move_to_end(number)
        self.reused_tokens += shared
        return held.cache.copied(1, capacity, shared)

    def work(
        self,
        number: int,
        keys: Sequence[TokenKey],
        cache: KVCache,
        pictures: Sequence[torch.Tensor],
    ) -> None:
        """A sequence begins; ``pictures`` are kept alive, so that keys stay their own."""
        self._working[number] = _Held(list(keys), cache, list(pictures))

    def finish(self, number: int, token_ids: Sequence[int]) -> None:
        """A sequence ended with these answer tokens: its cache is kept while there is room."""
        held = self._working.pop(number, None)
        if held is None or held.bytes > self.max_bytes:
            return
        keys = [*held.keys, *token_ids][: held.cache.length]
        # The room that its answer did not need is given back.
        held = _Held(keys, held.cache.copied(1, held.cache.length), held.pictures)
        for other, known in list(self._finished.items()):
            if known.common(keys) == len(known.keys):
                del self._finished[other]  # the beginning of this one
        self._finished[number] = held
        while self.held_bytes > self.max_bytes or len(self._finished) > _MOST:
            self._finished.popitem(last=False)

    def drop(self, number: int) -> None:
        """A sequence was given up."""
        self._working.pop(number, None)

    def clear(self) -> None:
        """Forget the sequences that finished."""
        self._finished.clear()


class _Held:
    """One cache, what it holds, and the pictures that its keys name."""

    def __init__(self, keys: list[TokenKey], cache: KVCache, pictures: list[torch.Tensor]) -> None:
        self.keys, self.cache, self.pictures = keys, cache, pictures

    @property
    def bytes(self) -> int:
        return self.cache.held_bytes

    def common(self, keys: Sequence[TokenKey]) -> int:
        limit = min(len(self.keys), len(keys), self.cache.length)
        return next((i for i in range(limit) if self.keys[i] != keys[i]), limit)
