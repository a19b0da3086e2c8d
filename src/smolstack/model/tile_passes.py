"""Encode tiles in small passes, and identical tiles only once.

Shapes: N tiles of P×P pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

TILES_AT_ONCE = 4  # tiles per pass of the tower; limits memory for images of any size

Filled: TypeAlias = "Sequence[tuple[int, int]] | None"


def in_passes(
    tiles: Tensor,
    encode: Callable[[Tensor, Filled], Tensor],
    filled: Filled = None,
    *,
    distinct: bool = False,
) -> tuple[list[Tensor], list[int]]:
    """Encode N tiles in passes of :data:`TILES_AT_ONCE`.

    Args:
        tiles: (N, 3, P, P).
        encode: maps some tiles, with their part of ``filled``, to (n, …).
        filled: for each tile the (rows, columns) of patches that contain image; None: all.
        distinct: the caller guarantees that no two tiles are equal; they are not compared then.

    Returns:
        The result of each pass, and for each of the N tiles its index in their concatenation.
    """
    each = list(range(tiles.shape[0]))
    firsts, copies = (each, each) if distinct else distinct_tiles(tiles, filled)
    encoded = []
    for start in range(0, len(firsts), TILES_AT_ONCE):
        some = firsts[start : start + TILES_AT_ONCE]
        encoded.append(encode(tiles[some], None if filled is None else [filled[i] for i in some]))
    return encoded, copies


def distinct_tiles(
    tiles: Tensor, filled: Sequence[tuple[int, int]] | None = None
) -> tuple[list[int], list[int]]:
    """Group tiles that are bitwise equal and have the same filled area.

    Returns:
        The index of the first tile of each group, and for each of the N tiles its group.
    """
    firsts: list[int] = []
    groups: list[int] = []
    by_sum: dict[tuple[float, tuple[int, int] | None], list[int]] = {}
    # One tile at a time, because summing in float64 makes a copy of eight bytes per value.
    for index, total in enumerate(float(tile.sum(dtype=torch.float64)) for tile in tiles):
        part = None if filled is None else filled[index]
        alike = by_sum.setdefault(
            (total, part), []
        )  # equal sums give candidates, torch.equal decides
        same = (g for g in alike if torch.equal(tiles[firsts[g]], tiles[index]))
        group = next(same, None)
        if group is None:
            group = len(firsts)
            firsts.append(index)
            alike.append(group)
        groups.append(group)
    return firsts, groups
