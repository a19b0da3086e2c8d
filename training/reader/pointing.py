"""Answers as the reader writes them: it points at each cell before it reads what that shows.

A decoder that must say which character comes next has to know where it is, and where the same
two characters stand twice, what it wrote last does not tell. So it writes that down: before a
character, the token of the 16-pixel cell that the middle of the character lies in, or where that
is the cell of the character before, one that says "further right". These are special tokens, which
decoding leaves out. (In the same way SmolDocling says where an element stands, Nassar et al. 2025.)

Such an answer begins with a token that says so. Without it, the first character of an answer that
does not point would seem likelier than any of the many cells.

To count lines, and on the way to one of them, it points at the beginning of each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.reader import shape
from training.reader.lines import Corners

Cell = tuple[int, int]  # row and column, from 0
STAYS = 0.5  # the share of a row, or of a lower character, that must show there
SHAKEN = 0.15  # the share of characters whose cell may be another one that shows them


@dataclass(frozen=True)
class Question:
    """A question in its words, and what it asks for.

    Attributes:
        words: as put to the reader.
        line: 0 for all lines, a line's number, or -1 for how many there are.
    """

    words: str
    line: int = 0

    def answer(self, lines: tuple[str, ...]) -> str:
        if self.line < 0:
            return str(len(lines))
        wanted = lines if self.line == 0 else lines[self.line - 1 : self.line]
        return "\n".join(wanted) or shape.NOTHING


def cells_of(
    size: tuple[int, int],
    grid: tuple[int, int],
    lines: Sequence[Sequence[Corners]],
    shaken: random.Random | None = None,
) -> list[list[Cell]]:
    """The cell of each character of each line: the one that the middle of its box lies in.

    Along a line the row stays the same while characters show there: high and low ones would make
    it jump up and down otherwise.

    Args:
        size: (width, height) of the picture.
        grid: (rows, cols) of its tiles.
        lines: the corners of each character's box, in picture pixels.
        shaken: some cells are another one that shows the character too, as a reader may point.
    """
    rows, cols = grid[0] * shape.CELLS, grid[1] * shape.CELLS
    found = []
    for line in lines:
        cells: list[Cell] = []
        row = -1
        for box in line:
            x = sum(corner[0] for corner in box) / len(box) * cols / size[0]
            wide = (box[1][0] - box[0][0]) * cols / size[0]
            heights = [corner[1] * rows / size[1] for corner in box]
            top, bottom = (heights[0] + heights[1]) / 2, (heights[2] + heights[3]) / 2
            shown = min(bottom, row + 1) - max(top, row)
            if shown < STAYS * min(1, bottom - top):
                row = min(max(int((top + bottom) / 2), 0), rows - 1)
            high = row
            if shaken is not None and shaken.random() < SHAKEN:
                x += shaken.uniform(-0.3, 0.3) * wide
                high = int(top + shaken.uniform(0.25, 0.75) * (bottom - top))
            cells.append((min(max(high, 0), rows - 1), min(max(int(x), 0), cols - 1)))
        found.append(cells)
    return found


def plain_ids(text: str) -> tuple[int, ...]:
    """Tokens of an answer without a cell, its leading space and its end included."""
    return (*f" {text}".encode(), shape.IDS[shape.END])


def pointing_ids(
    question: Question,
    lines: tuple[str, ...],
    cells: Sequence[Sequence[Cell]],
    pointed: Sequence[Sequence[Cell]] | None = None,
) -> tuple[int, ...]:
    """Tokens of the answer that points, its leading space and its end included.

    Args:
        lines: what the picture says.
        cells: of each line's visible characters.
        pointed: the cells that tokens name in place of those, if they are others.
    """
    pointed = cells if pointed is None else pointed
    parts = [_line_ids(*one) for one in zip(lines, cells, pointed, strict=True)]
    firsts = [cell_id(of_line[0]) for of_line in pointed]
    if question.line == 0 and lines:
        ids = [token for part in parts for token in (*part, *b"\n")][:-1]
    elif 0 < question.line <= len(lines):
        ids = [*firsts[: question.line - 1], *parts[question.line - 1]]
    else:
        ids = [*firsts, *question.answer(lines).encode()]
    return (*b" ", shape.IDS[shape.POINT], *ids, shape.IDS[shape.END])


def cell_id(cell: Cell) -> int:
    return shape.FIRST_CELL + cell[0] * shape.SIDE + cell[1]


def cell_of(token: int) -> Cell | None:
    """The cell that a token names; None if it is another token."""
    number = token - shape.FIRST_CELL
    return divmod(number, shape.SIDE) if 0 <= number < shape.SIDE**2 else None


def _line_ids(line: str, cells: Sequence[Cell], pointed: Sequence[Cell]) -> list[int]:
    ids: list[int] = []
    following, last = iter(zip(cells, pointed, strict=True)), None
    for character in line:
        if character != " ":
            cell, named = next(following)
            ids.append(shape.IDS[shape.RIGHT] if cell == last else cell_id(named))
            last = cell
        ids.extend(character.encode())
    return ids
