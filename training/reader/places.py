"""Directions in a patch's state: one for each character, one that is constant, and its place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from training.reader import shape
from training.reader.labels import CLASSES, WHERE

PLACE = 32  # channels for a patch's place: sine and cosine of row and column at 8 frequencies
FREQUENCIES = torch.linspace(0.15, 2.2, PLACE // 4)
NEXT_WAVES = (1, 2, 5, 6)  # of these, those that say where a patch's next character is: the four
NEXT = 4 * len(NEXT_WAVES)  # that tell any two cells apart best, in so many channels
PLACE_STRENGTH = 0.9  # of its place
CONSTANT = 3.0  # of a patch's state, along its direction


def codes(count: int, width: int) -> Tensor:
    """``count`` directions at right angles to each other, always the same: (count, width)."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(width, count, generator=generator, dtype=torch.float64)
    directions: Tensor = torch.linalg.qr(matrix).Q.T.float().contiguous()
    return directions


def directions(width: int) -> Tensor:
    """What a patch says along them, at right angles: (CLASSES + WHERE + NEXT, width).

    One for each class, then where it stands (``labels.py``), then the next character's place.
    """
    known = codes(CLASSES + 1, width)
    taken = torch.cat((known, constant_direction(width + PLACE)[None, :width]))
    for seed in range(3, 2 + WHERE + NEXT):
        free = _free(taken, seed)[None]
        known, taken = torch.cat((known, free)), torch.cat((taken, free))
    return known


def constant_direction(width: int) -> Tensor:
    """The direction of a patch's state that is always the same: (width,).

    At right angles to :func:`directions`, and to the place channels.
    """
    return functional.pad(_free(codes(CLASSES + 1, width - PLACE), seed=2), (0, PLACE))


def _free(taken: Tensor, seed: int) -> Tensor:
    """A direction at right angles to those, which are so to each other."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randn(taken.shape[1], generator=generator)
    free -= taken.T @ (taken @ free)
    direction: Tensor = free / free.norm()
    return direction


def places(side: int) -> Tensor:
    """Place channels of every patch, sines and cosines of its row, then its column.

    Returns:
        (side², PLACE).
    """
    angles = torch.arange(side)[:, None] * FREQUENCIES
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None, :].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).reshape(side * side, PLACE)


def moved(rows: float, columns: float) -> Tensor:
    """The matrix that turns the place channels of a patch into those of one some steps away."""
    matrix = torch.zeros(PLACE, PLACE)
    half = PLACE // 2
    for start, step in ((0, rows), (half, columns)):
        cos, sin = torch.diag((step * FREQUENCIES).cos()), torch.diag((step * FREQUENCIES).sin())
        turn = torch.cat((torch.cat((cos, sin), dim=1), torch.cat((-sin, cos), dim=1)))
        matrix[start : start + half, start : start + half] = turn
    return matrix


def cell_places() -> Tensor:
    """Place channels of a tile's cells, each the mean of its patches': (CELLS · GRID, PLACE)."""
    of_patches = places(shape.GRID).reshape(1, shape.GRID, shape.GRID, PLACE)
    means = functional.avg_pool2d(of_patches.permute(0, 3, 1, 2), (shape.SCALE, 1))
    return means[0].permute(1, 2, 0).reshape(-1, PLACE)


def next_channels() -> list[int]:
    """Which place channels say where the next character is."""
    count = PLACE // 4
    return [part * count + wave for part in range(4) for wave in NEXT_WAVES]
