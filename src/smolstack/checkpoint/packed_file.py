"""A disk cache of packed weights: later starts of a large quantized checkpoint map them.

A saved folder stores integers in a form that other programs read too. The kernels need another
order (backends/cpu/packed_weights.py), and packing a few billion weights takes seconds. Weights are
therefore packed once per folder and kept in the user's cache, in one file for each of the two
layouts that processors need. Later starts neither compute nor copy anything, and processes share
the memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import BinaryIO

import torch

from smolstack.backends.cpu.linear import pack
from smolstack.backends.cpu.packed_weights import Arena, PackedWeights, packed_size
from smolstack.checkpoint.source import Source
from smolstack.model.quantized import QuantizedLinear
from smolstack.model.vlm import VisionLanguageModel
from smolstack.native import library as native
from smolstack.native.compiling import cache_folders, is_own_file
from smolstack.output_files import atomic_file, remove_leftovers
from smolstack.quantization.quantize import Progress

logger = logging.getLogger(__name__)

SWITCH = "SMOLSTACK_PACKED_CACHE"  # 0: no cache on disk
LEAST = 256 * 2**20  # bytes: packing fewer takes less time than a file would
MOST = 32 * 2**30  # bytes of all cached files
_VERSION = 2
_SAMPLE = 4096  # bytes


def adopt_packed(
    model: VisionLanguageModel,
    source: Source,
    *,
    least: int = LEAST,
    progress: Progress | None = None,
) -> Path | None:
    """Pack a quantized model's weights, or map them from a cached file.

    Weights of fewer than ``least`` bytes are packed in memory, as are those of a model whose cache
    file cannot be written; this costs time only.

    Returns:
        The file that the weights are mapped from; None if there is none.
    """
    kernels = native.library() if model.device.type == "cpu" else None
    if kernels is None:
        return None
    layers = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    sizes = [packed_size(kernels, one.format, one.in_features, one.out_features) for one in layers]
    if not layers or any(layer.is_packed for layer in layers):
        return None
    kept = sum(sizes) >= least and os.environ.get(SWITCH, "1") != "0"
    name = f"{_key(source, kernels, layers)}.packed"
    for folder in cache_folders() if kept else []:
        path = folder / "packed" / name
        with contextlib.suppress(OSError):
            # Anyone who can write the file can change the weights.
            if is_own_file(path) and _is_whole(path, sizes):
                _map(kernels, layers, sizes, path)
                os.utime(path)  # last use
                return path
        try:
            _make(kernels, layers, sizes, path, progress)
        except OSError as error:
            logger.info("packed weights are not saved in %s: %s", path.parent, error)
            if any(layer.is_packed for layer in layers):  # from a deleted file
                return None
            continue
        _prune(path)
        return path
    _pack_all(kernels, layers, Arena(kernels, sum(sizes)), progress)
    return None


def _key(source: Source, kernels: native.Library, layers: list[QuantizedLinear]) -> str:
    """Return the cache key of files: a digest of their paths, sizes, inodes and times."""
    digest = hashlib.sha256(f"{_VERSION} {kernels.weight_offset}".encode())
    for file in sorted({entry.file for entry in source.entries.values()}):
        path = (source.weights.folder / file).resolve()
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns} ".encode())
        # A copy may preserve the modification time, but not the inode and its time of change.
        digest.update(f"{status.st_ctime_ns} {status.st_ino}\0".encode())
    digest.update(
        repr([(one.format, one.in_features, one.out_features) for one in layers]).encode()
    )
    return digest.hexdigest()[:32]


def _samples(file: BinaryIO, sizes: list[int]) -> bytes:
    """Return a digest of the first and last bytes of every layer; a complete digest would read for
    seconds what is only mapped.
    """
    digest, end = hashlib.sha256(), 0
    for size in sizes:
        end += size
        for start in (end - size, max(end - size, end - _SAMPLE)):
            file.seek(start)
            digest.update(file.read(min(_SAMPLE, size)))
    return digest.digest()


def _is_whole(path: Path, sizes: list[int]) -> bool:
    """Return whether a cached file has its full length and ends in the digest of its samples."""
    if path.stat().st_size != sum(sizes) + hashlib.sha256().digest_size:
        return False
    with path.open("rb") as file:
        found = _samples(file, sizes)
        file.seek(sum(sizes))
        return file.read() == found


def _map(
    kernels: native.Library, layers: list[QuantizedLinear], sizes: list[int], path: Path
) -> None:
    memory = torch.from_file(str(path), shared=False, size=sum(sizes), dtype=torch.uint8)
    for layer, part in zip(layers, torch.split(memory, sizes), strict=True):
        sizes_of = layer.in_features, layer.out_features
        layer.hold(PackedWeights(kernels, layer.format, *sizes_of, part))


def _make(
    kernels: native.Library,
    layers: list[QuantizedLinear],
    sizes: list[int],
    path: Path,
    progress: Progress | None,
) -> None:
    """Write a temporary file, then rename it: no partial file remains, also after a power failure.
    The model maps the file read-only.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with atomic_file(path, private=True, synced=True) as beside:
        _pack_all(kernels, layers, Arena(kernels, sum(sizes), beside), progress)
        with beside.open("r+b") as written:
            samples = _samples(written, sizes)
            written.seek(0, os.SEEK_END)
            written.write(samples)
        _map(kernels, layers, sizes, beside)


def _pack_all(
    kernels: native.Library,
    layers: list[QuantizedLinear],
    arena: Arena,
    progress: Progress | None,
) -> None:
    for i, layer in enumerate(layers):
        pack(kernels, layer, arena)
        if progress is not None:
            progress("packing", i + 1, len(layers))


def _prune(kept: Path) -> None:
    """Delete leftovers of killed processes, and the least recently used files until the rest is
    within the limit.
    """
    remove_leftovers(kept.parent)
    found = []
    for path in kept.parent.glob("*.packed"):
        with contextlib.suppress(OSError):  # another process may have deleted it
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    held = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if held <= MOST:
            return
        if path != kept:
            path.unlink(missing_ok=True)
            held -= size
