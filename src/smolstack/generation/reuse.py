"""Work not done twice: pictures encoded once, prompt prefixes read once.

Both caches hold exact results of the same computation; what changes the result (the picture's
bytes, its plan, the preprocessing, the weights) is part of the key.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image

from smolstack.batch import VisualTokens
from smolstack.model.cache import KVCache
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.geometry import TilePlan
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import ImageSource

DEFAULT_PICTURE_BYTES = 128 * 2**20

# A token as the prefix cache compares it: an id, or a visual token (its picture's tensor, place).
TokenKey: TypeAlias = "int | tuple[int, int]"


class PictureCache:
    """Visual tokens of the pictures seen last, by content, up to ``max_bytes``.

    0 bytes keeps nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_PICTURE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[bytes, VisualTokens] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    @property
    def held_bytes(self) -> int:
        """Bytes of the visual tokens held."""
        return sum(_size(entry) for entry in self._entries.values())

    def get(self, key: bytes) -> VisualTokens | None:
        """The entry of a key, which becomes the last to be dropped."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: bytes, visual: VisualTokens) -> None:
        """Keep an entry, dropping those unused for longest; one that is too large is not kept."""
        if _size(visual) > self.max_bytes:
            return
        self._entries[key] = visual
        self._entries.move_to_end(key)
        while self.held_bytes > self.max_bytes:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


def picture_key(
    picture: ImageSource, plan: TilePlan, settings: ImageSettings, model: VisionLanguageModel
) -> bytes:
    """A digest of everything that a picture's visual tokens depend on."""
    digest = hashlib.sha256()
    if isinstance(picture, (str, Path)):
        digest.update(b"file" + Path(picture).read_bytes())
    elif isinstance(picture, bytes):
        digest.update(b"file" + picture)
    elif isinstance(picture, Image.Image):
        # The palette and a transparent colour stand beside the pixels.
        extra = (picture.mode, picture.getpalette(), repr(picture.info.get("transparency")))
        digest.update(repr(extra).encode() + picture.tobytes())
    else:
        digest.update(b"array" + picture.tobytes())
    digest.update(repr((plan, settings)).encode())
    for part in (model.vision, model.connector):
        # Other tensors, or the same ones written to since (training), are other weights.
        weights = [(id(tensor), tensor._version, tensor.dtype) for tensor in part.parameters()]
        digest.update(repr(weights).encode())
    return digest.digest()


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


def _size(visual: VisualTokens) -> int:
    return visual.tokens.numel() * visual.tokens.element_size()
