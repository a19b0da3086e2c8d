"""Resize image channels with Pillow's exact results, using the compiled kernels where they agree.

Shapes: planes (3, height, width) uint8.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from smolstack.native import library as native

Planes = npt.NDArray[np.uint8]
_KERNELS = (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
# Sizes (width, height) before and after, for which the order of the two passes changes the result:
# newer versions of Pillow scale rows first where that saves the most work.
_PROBES = (((7, 60), (15, 9)), ((31, 37), (50, 21)), ((40, 40), (64, 33)), ((29, 64), (11, 48)))


def resize(planes: Planes, size: tuple[int, int], resample: int) -> Planes:
    """Resize all planes to ``size`` (width, height), as ``Image.resize`` would.

    Args:
        planes: (C, height, width).
        resample: Pillow's filter number.
    """
    before = (planes.shape[2], planes.shape[1])
    if before == size:
        return planes
    order = _order() if resample in _KERNELS and native.library() is not None else None
    if order is None:
        return _by_pillow(planes, size, resample)
    return _by_kernels(planes, size, resample, order and _rows_first(before, size))


def _rows_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """The rule of newer Pillow versions: the height shrinks by more than twice what the width
    does.
    """
    shrinks = before[1] - after[1]
    return shrinks > 0 and shrinks > 2 * (before[0] - after[0])


@lru_cache(maxsize=1)
def _order() -> bool | None:
    """Whether this Pillow ever scales rows first; None if its results differ from the kernels'."""
    if native.library() is None:
        return None
    noise = np.random.default_rng(0)
    for order in (True, False):
        same = True
        for resample in _KERNELS:
            for before, after in _PROBES:
                planes = noise.integers(0, 256, (3, before[1], before[0]), dtype=np.uint8)
                found = _by_kernels(planes, after, resample, order and _rows_first(before, after))
                same = same and np.array_equal(found, _by_pillow(planes, after, resample))
        if same:
            return order
    return None


def _by_kernels(planes: Planes, size: tuple[int, int], resample: int, rows_first: bool) -> Planes:
    import torch

    kernels = native.library()
    assert kernels is not None
    planes = np.ascontiguousarray(planes)
    out = np.empty((planes.shape[0], size[1], size[0]), dtype=np.uint8)
    failed = kernels.resize_planes(
        planes.ctypes.data,
        *planes.shape,
        size[1],
        size[0],
        int(resample),
        int(rows_first),
        out.ctypes.data,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory to scale an image to {size[0]}x{size[1]} pixels")
    return out


def _by_pillow(planes: Planes, size: tuple[int, int], resample: int) -> Planes:
    scaled = [Image.fromarray(plane).resize(size, Image.Resampling(resample)) for plane in planes]
    return np.stack([np.asarray(plane) for plane in scaled])
