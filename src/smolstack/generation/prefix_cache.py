"""The prefix cache: KV caches of what prompts begin with, read once for whoever comes later.

Tokens are compared by their ids, visual tokens by their image's content and their place in it.
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
_MOST = 64  # finished requests looked through for every newcomer
_STRIDE = 64  # tokens compared at once
# A token as it is compared: an id, or a visual token (its image's key, its place there).
TokenKey: TypeAlias = "int | tuple[bytes, int]"


def token_keys(
    token_ids: Sequence[int], image_token_id: int, images: Sequence[VisualTokens]
) -> list[TokenKey]:
    """The keys of a prompt's tokens, its images being visual tokens."""
    if not images:
        return list(token_ids)
    pairs = [(visual.key or weights_digest([visual.tokens]), len(visual)) for visual in images]
    visual_keys = ((key, place) for key, length in pairs for place in range(length))
    return [next(visual_keys) if token == image_token_id else token for token in token_ids]


def common_prefix(first: Sequence[TokenKey], second: Sequence[TokenKey], limit: int) -> int:
    """How many of at most ``limit`` tokens two sequences begin with in common."""
    start = 0
    while start < limit:
        end = min(start + _STRIDE, limit)
        if first[start:end] != second[start:end]:
            return next(i for i in range(start, end) if first[i] != second[i])
        start = end
    return limit


@dataclass
class Prefix:
    """What a prompt begins with: the first ``length`` tokens of a known KV cache."""

    entry: _Entry
    length: int


class PrefixCache:
    """KV caches of requests at work and of those that finished last, up to ``max_bytes``.

    A cache only ever grows at its end, so the beginning of one at work can be copied at any time.

    Args:
        max_bytes: of finished requests; 0 keeps none.

    Attributes:
        reused_tokens: prompt tokens that were not read again, so far.
    """

    def __init__(self, max_bytes: int = DEFAULT_PREFIX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.reused_tokens = 0
        self._working: dict[int, _Entry] = {}
        self._finished: OrderedDict[int, _Entry] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes of finished requests' caches, room that is left included."""
        return sum(entry.cache.reserved_bytes for entry in self._finished.values())

    def match(self, keys: Sequence[TokenKey]) -> Prefix | None:
        """The longest known beginning of a prompt.

        At least the last token of the prompt is left to be read, for its logits.
        """
        best: Prefix | None = None
        for entry in (*self._working.values(), *self._finished.values()):
            limit = min(len(entry.keys), len(keys) - 1, entry.cache.length)
            common = common_prefix(entry.keys, keys, limit)
            if common > (0 if best is None else best.length):
                best = Prefix(entry, common)
        return best

    def take(self, prefix: Prefix, capacity: int) -> KVCache:
        """A cache of one's own that begins with a known prefix, with room for ``capacity`` tokens.

        A conversation that goes on takes its cache over; of others the beginning is copied.
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
        return entry.cache.copied(1, capacity, length)

    def begin(self, number: int, keys: Sequence[TokenKey], cache: KVCache) -> None:
        """A request begins to read its prompt into ``cache``."""
        self._working[number] = _Entry(number, list(keys), cache)

    def finish(self, number: int, token_ids: Sequence[int]) -> None:
        """A request ended with these answer tokens: its cache is kept while there is room."""
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
        """Keep at most so many bytes: the room that answers did not need is given back first, then
        the caches that were unused for longest."""
        for entry in self._finished.values():
            if self.held_bytes <= most:
                break
            if entry.cache.length < entry.cache.capacity:
                entry.cache = entry.cache.copied(1, entry.cache.length)
        while self._finished and (self.held_bytes > most or len(self._finished) > _MOST):
            self._finished.popitem(last=False)

    def drop(self, number: int) -> None:
        """A request was given up."""
        self._working.pop(number, None)

    def clear(self) -> None:
        """Forget the requests that finished."""
        self._finished.clear()


@dataclass
class _Entry:
    """One cache and what it holds."""

    number: int
    keys: list[TokenKey]
    cache: KVCache

    def is_beginning_of(self, other: _Entry) -> bool:
        length = len(self.keys)
        return length <= len(other.keys) and self.keys == other.keys[:length]
