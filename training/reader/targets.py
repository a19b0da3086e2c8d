"""Which cells show a character: on the tiles, on the tile of the whole, or on both.

Of a large character any cell about its middle will do, and none is right where its neighbour is
wrong; so a character has a box of cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from training.reader import shape
from training.reader.lines import Corners

ABOUT = 0.2  # of a line's height, above and below its middle
ON_WHOLE = 12.0  # pixels; characters this wide on the tile of the whole are read there,
MAY_BE_ON_WHOLE = 9.5, 16.0  # and between these on the tiles as well
WIDE = 0.6  # how wide a character is thought to be, for its line's height, at least


class View(Enum):
    """Where a cell lies: on the tiles that an image is cut into, or on that of the whole."""

    TILES = 0
    WHOLE = 1


@dataclass(frozen=True)
class Box:
    """The cells of one view that show a character, and the one that shows its middle."""

    rows: range
    cols: range
    middle: tuple[int, int]


@dataclass(frozen=True)
class Spot:
    """The cells that show a character, in each view that it may be read in; and the better view."""

    boxes: dict[View, Box]
    best: View


def spots_of(
    size: tuple[int, int],
    grid: tuple[int, int],
    lines: Sequence[Sequence[Corners]],
) -> list[list[Spot]]:
    """The cells of each character of each line.

    Args:
        size: (width, height) of the image.
        grid: (rows, cols) of its tiles.
        lines: the corners of each character's box, in image pixels.
    """
    views, best = _views(size, grid, lines)
    found: list[list[Spot]] = [[] for _ in lines]
    for index, line in enumerate(lines):
        of_views = {view: boxes_of(size, cells_in(view, grid), line) for view in views}
        for at in range(len(line)):
            boxes = {view: of_view[at] for view, of_view in of_views.items()}
            found[index].append(Spot(boxes, best))
    return found


def cells_in(view: View, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells."""
    rows, cols = grid if view is View.TILES else (1, 1)
    return rows * shape.CELLS, cols * shape.CELLS * shape.HALVES


def _views(
    size: tuple[int, int], grid: tuple[int, int], lines: Sequence[Sequence[Corners]]
) -> tuple[list[View], View]:
    """The views that an image's characters may be read in, and the better one."""
    boxes = [box for line in lines for box in line]
    if not boxes:
        return [View.TILES], View.TILES
    width = sum(math.dist(box[0], box[1]) for box in boxes) / len(boxes)
    height = max(math.dist(box[0], box[3]) for box in boxes)
    of_whole = shape.TILE / size[0] * max(width, WIDE * height)
    high = shape.TILE / size[1] * height
    smaller = min(of_whole, WIDE * high)
    low, enough = MAY_BE_ON_WHOLE
    best = View.WHOLE if smaller >= ON_WHOLE else View.TILES
    if low <= smaller <= enough:
        return [View.TILES, View.WHOLE], best
    return [best], best


def boxes_of(size: tuple[int, int], cells: tuple[int, int], line: Sequence[Corners]) -> list[Box]:
    """The box of cells of each character of a line, in a view of so many rows and columns."""
    scale = cells[1] / size[0], cells[0] / size[1]
    slope = _slope(line) * scale[1] / scale[0]  # in cells down per cell to the right
    edges = []
    for box in line:
        xs, ys = [corner[0] * scale[0] for corner in box], [corner[1] * scale[1] for corner in box]
        left, right = (xs[0] + xs[3]) / 2, (xs[1] + xs[2]) / 2
        top, bottom = (ys[0] + ys[1]) / 2, (ys[2] + ys[3]) / 2
        edges.append((left, right, top, bottom))
    level = [slope * (left + right) / 2 for left, right, *_ in edges]
    highest = min(edge[2] - at for edge, at in zip(edges, level, strict=True))
    lowest = max(edge[3] - at for edge, at in zip(edges, level, strict=True))
    found = []
    for (left, right, top, bottom), at in zip(edges, level, strict=True):
        about = ABOUT * (lowest - highest)
        middle = (highest + lowest) / 2 + at
        # A line's middle, but where a character does not reach it, such as a full stop, its own.
        if top > middle or bottom < middle:
            middle = (top + bottom) / 2
            about = min(about, ABOUT * (bottom - top))
        # Cells whose middle lies in the inner half of the character: next to its edge, a cell may
        # be taken for the neighbour's, and the character be read twice.
        across = max(0.0, (right - left) / 4 - 0.25)
        x = (left + right) / 2
        found.append(
            Box(
                _range(max(middle - about, top), min(middle + about, bottom), cells[0]),
                _range(x - across, x + across, cells[1]),
                (_clamp(middle, cells[0]), _clamp(x, cells[1])),
            )
        )
    return found


def _slope(line: Sequence[Corners]) -> float:
    """Image pixels down per pixel to the right: of the widest character's upper edge."""
    box = max(line, key=lambda one: one[1][0] - one[0][0])
    wide = box[1][0] - box[0][0]
    return (box[1][1] - box[0][1]) / wide if wide > 0 else 0.0


def _range(low: float, high: float, count: int) -> range:
    return range(_clamp(low, count), _clamp(high, count) + 1)


def _clamp(value: float, count: int) -> int:
    return min(max(math.floor(value), 0), count - 1)
