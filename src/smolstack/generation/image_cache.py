"""The image cache: visual tokens by image content, in memory and optionally on disk.

Entries are exact results of the same computation. Everything that changes the result (the image's
bytes, its plan, the preprocessing, the weights, the kernels) is part of the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from smolstack.batch import VisualTokens
from smolstack.model.digest import weights_digest
from smolstack.model.vlm import VisionLanguageModel
from smolstack.model.weight_changes import WeightsVersion
from smolstack.output_files import atomic_file, remove_leftovers
from smolstack.processor.geometry import TilePlan
from smolstack.processor.image_hash import content_digest
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import ImageSource

DEFAULT_IMAGE_BYTES = 128 * 2**20
DEFAULT_FOLDER_BYTES = 4 * 2**30
_FORMAT = b"smolstack visual tokens 2"  # changes when the same image gives other tokens


class ImageCache:
    """Visual tokens of one model's recently used images, by content. Thread-safe.

    Args:
        model: the model that encodes the images.
        max_bytes: memory limit.

    Attributes:
        max_bytes: memory limit; 0 keeps nothing in memory. A lower one evicts entries at once.
        folder: folder of entries on disk, for later processes; None: no disk cache. Set it before
            the first image. Files are written atomically, so several processes may share a folder.
        max_folder_bytes: disk limit; least recently used files are deleted first.
    """

    def __init__(self, model: VisionLanguageModel, max_bytes: int = DEFAULT_IMAGE_BYTES) -> None:
        self.model, self._max_bytes = model, max_bytes
        self.folder: Path | None = None
        self.max_folder_bytes = DEFAULT_FOLDER_BYTES
        self._entries: OrderedDict[bytes, VisualTokens] = OrderedDict()
        self._held = 0
        self._lock = threading.RLock()
        self._name = os.urandom(16)  # weight versions of different models coincide
        self._weights = WeightsVersion(model.vision, model.connector)
        self._digest: tuple[int, bytes] = (0, b"")  # by weight version

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries or (self.folder is not None and self._path(key).is_file())

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, limit: int) -> None:
        with self._lock:
            self._max_bytes = limit
            self._evict()

    @property
    def held_bytes(self) -> int:
        """Bytes of the visual tokens in memory."""
        return self._held

    def key(self, image: ImageSource, plan: TilePlan, settings: ImageSettings) -> bytes:
        """Return a digest of everything that an image's visual tokens depend on."""
        digest = hashlib.sha256(_FORMAT)
        digest.update(content_digest(image))
        digest.update(repr((plan, settings)).encode())
        with self._lock:
            # Replaced or modified weights (training) have another version.
            number = self._weights.current()
            if self.folder is None or self._weights.hooked:
                digest.update(self._name + str(number).encode())
            else:
                digest.update(self._values(number))
        return digest.digest()

    def get(self, key: bytes) -> VisualTokens | None:
        """Return the entry of a key and mark it as recently used; None if there is none."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        if self.folder is None:
            return None
        found = _read(self._path(key))
        if found is not None:
            self._remember(key, found.keyed(key))
        return found

    def put(self, key: bytes, visual: VisualTokens) -> None:
        """Add an entry and evict the least recently used ones; an entry that is too large is not
        added.

        If the folder cannot be written to, the entry is kept in memory only.
        """
        self._remember(key, visual)
        if self.folder is None or self._weights.hooked:
            return
        if _size(visual) <= self.max_folder_bytes:
            with contextlib.suppress(OSError):
                _write(self._path(key), visual)
                _prune(self.folder, self.max_folder_bytes)

    def clear(self) -> None:
        """Clear the memory cache; the folder is not changed."""
        with self._lock:
            self._entries.clear()
            self._held = 0

    def _remember(self, key: bytes, visual: VisualTokens) -> None:
        if _size(visual) > self.max_bytes:
            return
        with self._lock:
            replaced = self._entries.pop(key, None)
            self._held += _size(visual) - (0 if replaced is None else _size(replaced))
            self._entries[key] = visual
            self._evict()

    def _evict(self) -> None:
        while self._held > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._held -= _size(dropped)

    def _path(self, key: bytes) -> Path:
        assert self.folder is not None
        return self.folder / f"{key.hex()}.safetensors"

    def _values(self, number: int) -> bytes:
        """Return a digest of the weights and kernels, computed once per weight version."""
        if self._digest[0] != number:
            model = self.model
            how = f"{model.precision} {model.device.type} {torch.__version__}".encode()
            how += self._weights.description()
            self._digest = number, weights_digest(self._weights.tensors()) + how
        return self._digest[1]


def _size(visual: VisualTokens) -> int:
    return visual.tokens.numel() * visual.tokens.element_size()


def _read(path: Path) -> VisualTokens | None:
    """Return an entry from disk, or None if it is missing or incomplete."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {})["image"])
            tokens = file.get_tensor("tokens").clone()
        os.utime(path)  # last use
        return VisualTokens(tokens, about["rows"], about["cols"], tuple(about["source"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(path: Path, visual: VisualTokens) -> None:
    """Write a temporary file, then rename it: entries are always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"rows": visual.rows, "cols": visual.cols, "source": list(visual.source)}
    tokens = visual.tokens.detach().cpu().contiguous()
    with atomic_file(path, private=True) as beside:
        try:
            save_file({"tokens": tokens}, beside, metadata={"image": json.dumps(about)})
        except SafetensorError as error:  # e.g. a full disk
            raise OSError(str(error)) from error


def _prune(folder: Path, most: int) -> None:
    """Delete leftovers of killed processes, and the least recently used files until the rest is
    within the limit.
    """
    remove_leftovers(folder)
    files = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process may have deleted it
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    held = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if held <= most:
            return
        path.unlink(missing_ok=True)
        held -= size
