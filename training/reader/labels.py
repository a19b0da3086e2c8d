"""Which character each patch shows, where in it and in its line, and where the next one stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from training.reader import shape
from training.reader.lines import Corners
from training.reader.targets import View, boxes_of, cells_in

BACKGROUND = 0
CLASSES = 1 + len(shape.CHARACTERS)
CLASS_OF = {character: 1 + index for index, character in enumerate(shape.CHARACTERS)}
IGNORED = -100
WHERE = 7  # what says where a patch stands: two numbers in its character, and of this character,
FIRST, LAST, FINAL = 2, 3, 4  # whether it is the first of a line, the last, the last of all lines,
GAP, OFF = 5, 6  # whether a space follows, whether the next one stands in the tile on the right
COVERED = 0.15  # the share of a patch that a character's box must cover to name it
SMALLEST = 0.7  # patches; a smaller box is labelled as if it were this wide or high
FINE = 4  # coverage is counted on FINE² points per patch
READABLE = 7.0  # pixels; narrower characters are not to be named

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shown:
    """The visible characters of an image.

    Attributes:
        characters: all of them, in reading order.
        lengths: how many of them are in each line.
        gaps: whether a space follows each.
        corners: of each one's box, in image pixels.
        width: the mean width of one on the tiles, in their pixels.
    """

    characters: str
    lengths: Sequence[int]
    gaps: Sequence[bool]
    corners: Sequence[Corners]
    width: float


def patch_labels(
    size: tuple[int, int], grid: tuple[int, int], shown: Shown
) -> tuple[Ints, Floats, Ints]:
    """Labels of every patch of an image's tiles, the whole image's tile last.

    Args:
        size: (width, height) of the image.
        grid: (rows, cols) of its tiles.
        shown: its characters. On the tile of the whole, where they are narrower, those too narrow
            to be read are IGNORED.

    Returns:
        The class of the character whose box covers most of each patch, (n, H·W); (n, H·W, WHERE)
        where in the box the patch's middle lies, as cos(π·x) with x from 0, its left edge, to 1,
        and as cos(π·y) from top to bottom, then 1 where FIRST, LAST, FINAL, GAP, OFF hold, all 0 on
        the background; and (n, H·W, 4) the cells that show the line's next character, as first and
        last row and first and last column in the patch's tile, or if OFF in that on its right, and
        -1 where there is none. cos(π·x) tells two equal characters side by side from one, cos(π·y)
        two lines from one that is high.
    """
    rows, cols = grid
    side = shape.GRID
    classes, places, following = _of_grid(size, rows, cols, shown)

    def cut(of_all: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        tiles = of_all.reshape(rows, side, cols, side).transpose(0, 2, 1, 3)
        return tiles.reshape(rows * cols, side * side)

    def cut_all(of_all: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.stack([cut(of_all[..., axis]) for axis in range(of_all.shape[-1])], axis=-1)

    of_whole, whole_places, whole_following = _of_grid(size, 1, 1, shown)
    if shown.width / cols < READABLE:
        of_whole[of_whole != BACKGROUND] = IGNORED
        whole_following[:] = -1
    return (
        np.concatenate([cut(classes), of_whole.reshape(1, -1)]).astype(np.int64),
        np.concatenate([cut_all(places), whole_places.reshape(1, -1, WHERE)]),
        np.concatenate([cut_all(following), whole_following.reshape(1, -1, 4)]),
    )


def _of_grid(
    size: tuple[int, int], rows: int, cols: int, shown: Shown
) -> tuple[Ints, Floats, Ints]:
    """Labels of the whole image, laid over rows by cols tiles."""
    high, wide = rows * shape.GRID, cols * shape.GRID
    classes = np.zeros(high * wide, dtype=np.int64)
    places = np.zeros((high * wide, WHERE), dtype=np.float32)
    following = np.full((high * wide, 4), -1, dtype=np.int64)

    def laid_out() -> tuple[Ints, Floats, Ints]:
        return (
            classes.reshape(high, wide),
            places.reshape(high, wide, WHERE),
            following.reshape(high, wide, 4),
        )

    if not shown.characters:
        return laid_out()
    boxes = np.asarray(shown.corners, dtype=np.float32) * (
        wide / size[0],
        high / size[1],
    )  # in patches
    boxes = _grown(boxes)
    painted = Image.new("I", (wide * FINE, high * FINE))
    draw = ImageDraw.Draw(painted)
    for index, box in enumerate((boxes * FINE - 0.5).tolist()):
        draw.polygon([tuple(corner) for corner in box], fill=index + 1)
    fine = np.asarray(painted).reshape(high, FINE, wide, FINE).transpose(0, 2, 1, 3)
    points = fine.reshape(high * wide, FINE * FINE)
    seen = np.nonzero(points.any(axis=1))[0]
    inked = points[seen]
    counts = (inked[:, :, None] == inked[:, None, :]).sum(axis=2) * (inked > 0)
    most = counts.argmax(axis=1)
    index = inked[np.arange(len(seen)), most] - 1
    enough = counts.max(axis=1) >= COVERED * FINE * FINE
    seen, index = seen[enough], index[enough]
    classes[seen] = np.array([CLASS_OF[character] for character in shown.characters])[index]
    middles = np.stack([seen % wide + 0.5, seen // wide + 0.5], axis=1)
    start = boxes[index, 0]
    for axis, corner in enumerate((1, 3)):
        along = boxes[index, corner] - start
        share = ((middles - start) * along).sum(axis=1) / (along**2).sum(axis=1)
        places[seen, axis] = np.cos(np.pi * share.clip(0, 1))
    ends = np.cumsum(shown.lengths)
    places[seen, FIRST] = np.isin(index, ends - np.asarray(shown.lengths))
    places[seen, LAST] = np.isin(index, ends - 1)
    places[seen, FINAL] = index == ends[-1] - 1
    places[seen, GAP] = np.asarray(shown.gaps)[index]
    tiles = np.stack([seen // wide, seen % wide], axis=1) // shape.GRID
    found = _next_cells(size, (rows, cols), shown)[index]
    following[seen], places[seen, OFF] = _within(found, tiles)
    return laid_out()


def _next_cells(size: tuple[int, int], grid: tuple[int, int], shown: Shown) -> Ints:
    """The cells that show each character's next one, as in :func:`patch_labels`: (n, 4).

    In an image of (rows, cols) tiles; where a line is over, -1.
    """
    cells = cells_in(View.TILES, grid)
    found: list[tuple[int, ...]] = []
    start = 0
    for length in shown.lengths:
        for box in boxes_of(size, cells, shown.corners[start : start + length])[1:]:
            found.append((box.rows[0], box.rows[-1], box.cols[0], box.cols[-1]))
        found.append((-1,) * 4)
        start += length
    return np.asarray(found, dtype=np.int64)


def _within(cells: Ints, tiles: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Cells of the image as those of a tile, or of the one on its right; and which these are.

    Args:
        cells: (n, 4), -1 for none.
        tiles: (n, 2) row and column of the tile.
    """
    high, wide = shape.CELLS, shape.CELLS * shape.HALVES
    local = cells - np.repeat(tiles * (high, wide), 2, axis=1)
    off = (local[:, 2] >= wide) & (cells[:, 0] >= 0)
    local[off, 2:] -= wide
    lost = (cells[:, 0] < 0) | (local[:, 1] < 0) | (local[:, 0] >= high)
    lost |= (local[:, 3] < 0) | (local[:, 2] >= wide)
    local = local.clip(0, np.repeat((high - 1, wide - 1), 2))
    local[lost] = -1
    return local, off & ~lost


def _grown(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The same boxes, (n, 4, 2) in patches, the thin and the flat ones grown to SMALLEST."""
    middle = boxes.mean(axis=1, keepdims=True)
    for first, second, third, fourth in ((0, 1, 3, 2), (0, 3, 1, 2)):
        along = boxes[:, second] - boxes[:, first]
        length = np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-3)
        more = along / length * np.maximum(0, SMALLEST - length) / 2
        boxes = boxes.copy()
        boxes[:, first] -= more
        boxes[:, third] -= more
        boxes[:, second] += more
        boxes[:, fourth] += more
    centred: npt.NDArray[np.float32] = boxes + middle - boxes.mean(axis=1, keepdims=True)
    return centred
