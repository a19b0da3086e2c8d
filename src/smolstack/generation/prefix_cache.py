"""The prefix cache: KV caches of earlier prompts, reused by prompts with the same beginning.

Text tokens are compared by id, visual tokens by their image's content and their index in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from smolstack.batch import VisualTokens
from smolstack.model.digest import weights_digest
from smolstack.model.kv_cache import KVCache

DEFAULT_PREFIX_BYTES = 256 * 2**20
_MOST = 64  # finished requests compared with every new one
_STRIDE = 64  # tokens compared at once
# A token for comparison: an id, or a visual token (its image's key, its index in the image).
TokenKey: TypeAlias = "int | tuple[bytes, int]"


def token_keys(
    token_ids: Sequence[int], image_token_id: int, images: Sequence[VisualTokens]
) -> list[TokenKey]:
    """Return the keys of a prompt's tokens, given its images' visual tokens."""
    if not images:
        return list(token_ids)
    pairs = [(visual.key or weights_digest([visual.tokens]), len(visual)) for visual in images]
    visual_keys = ((key, place) for key, length in pairs for place in range(length))
    return [next(visual_keys) if token == image_token_id else token for token in token_ids]


def common_prefix(first: Sequence[TokenKey], second: Sequence[TokenKey], limit: int) -> int:
    """Return the length of the common prefix of two sequences, up to ``limit`` tokens."""
    start = 0
    while start < limit:
        end = min(start + _STRIDE, limit)
        if first[start:end] != second[start:end]:
            return next(i for i in range(start, end) if first[i] != second[i])
        start = end
    return limit


@dataclass
class Prefix:
    """A known beginning of a prompt: the first ``length`` tokens of a KV cache."""

    entry: _Entry
    length: int


class PrefixCache:
    """KV caches of running requests and of recently finished ones, up to ``max_bytes``.

    Caches only grow at their end, so the beginning of a running request's cache can be copied at
    any time.

    Args:
        max_bytes: limit for finished requests; 0 keeps none.

    Attributes:
        reused_tokens: total number of prompt tokens copied from the cache.
    """

    def __init__(self, max_bytes: int = DEFAULT_PREFIX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.reused_tokens = 0
        self._working: dict[int, _Entry] = {}
        self._finished: OrderedDict[int, _Entry] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes of finished requests' caches, including unused capacity."""
        return sum(entry.cache.reserved_bytes for entry in self._finished.values())

    def match(self, keys: Sequence[TokenKey]) -> Prefix | None:
        """Return the longest known prefix of a prompt.

        At least the last token of the prompt is left out, because its logits are needed.
        """
        best: Prefix | None = None
        for entry in (*self._working.values(), *self._finished.values()):
            limit = min(len(entry.keys), len(keys) - 1, entry.cache.length)
            common = common_prefix(entry.keys, keys, limit)
            if common > (0 if best is None else best.length):
                best = Prefix(entry, common)
        return best

    def take(self, prefix: Prefix, capacity: int) -> KVCache:
        """Return a new cache that begins with a known prefix, with room for ``capacity`` tokens.

        A continued conversation takes over its cache; otherwise the prefix is copied.
        """
        entry, length = prefix.entry, prefix.length
        self.reused_tokens += length
        if entry.number in self._finished:
            self._finished.move_to_end(entry.number)
            if length == len(entry.keys):
                del self._finished[entry.number]
                entry.cache.truncate(length)
                entry.cache.reserve(capacity)
                return entry.cache
        return entry.cache.copied(capacity, length)

    def begin(self, number: int, keys: Sequence[TokenKey], cache: KVCache) -> None:
        """Register a request that starts reading its prompt into ``cache``."""
        self._working[number] = _Entry(number, list(keys), cache)

    def finish(self, number: int, token_ids: Sequence[int]) -> None:
        """Record that a request ended with these answer tokens; its cache is kept while there is
        room.
        """
        entry = self._working.pop(number, None)
        if entry is None or entry.cache.held_bytes > self.max_bytes:
            return
        entry.keys = [*entry.keys, *token_ids][: entry.cache.length]
        for other, known in list(self._finished.items()):
            if known.is_beginning_of(entry):
                del self._finished[other]
        self._finished[number] = entry
        self.shrink(self.max_bytes)

    def shrink(self, most: int) -> None:
        """Reduce the cache to ``most`` bytes: unused capacity is freed first, then the least
        recently used caches.
        """
        for entry in self._finished.values():
            if self.held_bytes <= most:
                break
            if entry.cache.length < entry.cache.capacity:
                entry.cache = entry.cache.copied(entry.cache.length)
        while self._finished and (self.held_bytes > most or len(self._finished) > _MOST):
            self._finished.popitem(last=False)

    def drop(self, number: int) -> None:
        """Remove a request that was aborted."""
        self._working.pop(number, None)

    def clear(self) -> None:
        """Remove all finished requests."""
        self._finished.clear()


@dataclass
class _Entry:
    """A cache and its contents."""

    number: int
    keys: list[TokenKey]
    cache: KVCache

    def is_beginning_of(self, other: _Entry) -> bool:
        length = len(self.keys)
        return length <= len(other.keys) and self.keys == other.keys[:length]
