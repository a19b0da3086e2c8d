"""Images encoded once: their visual tokens by content, in memory and, if asked for, on disk.

Entries are exact results of the same computation; what changes the result (the image's bytes, its
plan, the preprocessing, the weights, what multiplies them) is part of the key.
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
from smolstack.model.digest import WeightsVersion, weights_digest
from smolstack.model.vlm import VisionLanguageModel
from smolstack.output_files import whole_file
from smolstack.processor.geometry import TilePlan
from smolstack.processor.image_hash import content_digest
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import ImageSource

DEFAULT_IMAGE_BYTES = 128 * 2**20
DEFAULT_FOLDER_BYTES = 4 * 2**30
_FORMAT = b"smolstack visual tokens 2"  # counts up when a file's tokens would be others


class ImageCache:
    """Visual tokens of the images of one model that were seen last, by content. Safe in any thread.

    Args:
        model: what encodes them.
        max_bytes: of memory.

    Attributes:
        max_bytes: of memory; 0 keeps nothing there.
        folder: where entries are kept on disk too, for later processes; None: nowhere. Set it
            before the first image. Files are written beside their place and renamed, so several
            processes may share a folder.
        max_folder_bytes: of disk; the files unused for longest go first.
    """

    def __init__(self, model: VisionLanguageModel, max_bytes: int = DEFAULT_IMAGE_BYTES) -> None:
        self.model, self.max_bytes = model, max_bytes
        self.folder: Path | None = None
        self.max_folder_bytes = DEFAULT_FOLDER_BYTES
        self._entries: OrderedDict[bytes, VisualTokens] = OrderedDict()
        self._held = 0
        self._lock = threading.RLock()
        self._name = os.urandom(16)  # another model's weights have the same numbers
        self._weights = WeightsVersion(model.vision, model.connector)
        self._digest: tuple[int, bytes] = (0, b"")  # of weights of a number

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries or (self.folder is not None and self._path(key).is_file())

    @property
    def held_bytes(self) -> int:
        """Bytes of the visual tokens held in memory."""
        return self._held

    def key(self, image: ImageSource, plan: TilePlan, settings: ImageSettings) -> bytes:
        """A digest of everything that an image's visual tokens depend on."""
        digest = hashlib.sha256(_FORMAT)
        digest.update(content_digest(image))
        digest.update(repr((plan, settings)).encode())
        with self._lock:
            # Weights that were replaced or written to (training) have another number.
            number = self._weights.current()
            if self.folder is None:
                digest.update(self._name + str(number).encode())
            else:
                digest.update(self._values(number))
        return digest.digest()

    def get(self, key: bytes) -> VisualTokens | None:
        """The entry of a key, which becomes the last to be dropped."""
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
        """Keep an entry, dropping those unused for longest; one that is too large is not kept.

        A folder that cannot be written to costs nothing but the entry.
        """
        self._remember(key, visual)
        if self.folder is not None and _size(visual) <= self.max_folder_bytes:
            with contextlib.suppress(OSError):
                _write(self._path(key), visual)
                _prune(self.folder, self.max_folder_bytes)

    def clear(self) -> None:
        """Forget everything that is in memory; a folder keeps what it holds."""
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
            while self._held > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._held -= _size(dropped)

    def _path(self, key: bytes) -> Path:
        assert self.folder is not None
        return self.folder / f"{key.hex()}.safetensors"

    def _values(self, number: int) -> bytes:
        """The weights' values and what multiplies them, computed once per number."""
        if self._digest[0] != number:
            model = self.model
            how = f"{model.precision} {model.device.type} {torch.__version__}".encode()
            self._digest = number, weights_digest(self._weights.tensors()) + how
        return self._digest[1]


def _size(visual: VisualTokens) -> int:
    return visual.tokens.numel() * visual.tokens.element_size()


def _read(path: Path) -> VisualTokens | None:
    """A kept entry, or None when there is no whole one."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {})["image"])
            tokens = file.get_tensor("tokens").clone()
        os.utime(path)  # used last
        return VisualTokens(tokens, about["rows"], about["cols"], tuple(about["source"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(path: Path, visual: VisualTokens) -> None:
    """Write beside its place, then rename: never half an entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"rows": visual.rows, "cols": visual.cols, "source": list(visual.source)}
    tokens = visual.tokens.detach().cpu().contiguous()
    with whole_file(path, private=True) as beside:
        try:
            save_file({"tokens": tokens}, beside, metadata={"image": json.dumps(about)})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from error


def _prune(folder: Path, most: int) -> None:
    """Drop the files unused for longest until the rest fits."""
    files = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process may have dropped it
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    held = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if held <= most:
            return
        path.unlink(missing_ok=True)
        held -= size
