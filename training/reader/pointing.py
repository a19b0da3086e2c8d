"""Answers as the reader writes them: it points at each cell before it reads what that shows.

A decoder that must say which character comes next has to know where it is, and where the same
two characters stand twice, what it wrote last does not tell. So it writes that down: before a
character, the token of a cell that shows it, or where that is the cell pointed at last, one that
says "further right". A cell is half of what one visual token shows, 8 pixels wide and 16 high.
These are special tokens, which decoding leaves out. (In the same way SmolDocling says where an
element stands, Nassar et al. 2025.)

Small characters are pointed at on the tiles. Large ones, of which a tile's edge cuts many, are on
the tile of the whole image. ``targets.py`` says which cells show a character well enough.

Such an answer begins with a token that says so. Without it, the first character of an answer that
does not point would seem likelier than any of the many cells.

To count lines, and on the way to one of them, it points at the beginning of each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.reader import shape
from training.reader.targets import Spot, View

COLUMNS = {View.TILES: shape.HALVES * shape.SIDE, View.WHOLE: shape.HALVES * shape.CELLS}
ON_TILES = shape.SIDE * COLUMNS[View.TILES]  # how many cells all tiles have
MIDDLE = 0.6  # the share of characters whose cell is the one that shows their middle


class Cell(NamedTuple):
    """Half of what one visual token shows: its row and column, from 0, in a view."""

    row: int
    col: int
    view: View = View.TILES


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


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, its leading space and its end included.

    Attributes:
        ids: the tokens.
        spots: for each that points, what it points at; for others None.
    """

    ids: tuple[int, ...]
    spots: tuple[Spot | None, ...]

    @property
    def goals(self) -> list[list[int]]:
        """For each token, all that would be right in its place."""
        found, last = [], None
        for token, spot in zip(self.ids, self.spots, strict=True):
            if spot is None:
                found.append([token])
                continue
            cells = cells_of(spot, view=None if last is None else last.view)
            wanted = [cell_id(cell) for cell in cells if cell != last]
            found.append(wanted + [shape.IDS[shape.RIGHT]] * (last in cells))
            last = cell_of(token) or last
        return found


def plain_answer(text: str) -> Answer:
    """An answer that does not point."""
    ids = (*f" {text}".encode(), shape.IDS[shape.END])
    return Answer(ids, (None,) * len(ids))


def pointing_answer(
    question: Question,
    lines: tuple[str, ...],
    spots: Sequence[Sequence[Spot]],
    rng: random.Random | None = None,
) -> Answer:
    """The answer that points at each character that it reads.

    Args:
        lines: what the image says.
        spots: of each line's visible characters.
        rng: chooses which of the cells that show a character is named, mostly that of its middle;
            without one, always that.
    """
    writer = _Writer(rng)
    writer.write([*b" ", shape.IDS[shape.POINT]])
    if question.line == 0 and lines:
        for index, (line, of_line) in enumerate(zip(lines, spots, strict=True)):
            writer.write([*b"\n"] if index else [])
            writer.read(line, of_line)
    elif 0 < question.line <= len(lines):
        for of_line in spots[: question.line - 1]:
            writer.point(of_line[0])
        writer.read(lines[question.line - 1], spots[question.line - 1])
    else:
        for of_line in spots:
            writer.point(of_line[0])
        writer.write([*question.answer(lines).encode()])
    writer.write([shape.IDS[shape.END]])
    return Answer(tuple(writer.ids), tuple(writer.spots))


class _Writer:
    """An answer as far as it is written, and where it points."""

    def __init__(self, rng: random.Random | None) -> None:
        self.rng = rng
        self.ids: list[int] = []
        self.spots: list[Spot | None] = []
        self.last: Cell | None = None

    def write(self, ids: list[int]) -> None:
        self.ids += ids
        self.spots += [None] * len(ids)

    def point(self, spot: Spot) -> None:
        view = None if self.last is None else self.last.view
        cells = cells_of(spot, view)
        cell = cells[0]
        if self.rng is not None and self.rng.random() > MIDDLE:
            cell = self.rng.choice(cells)
        self.ids.append(shape.IDS[shape.RIGHT] if cell == self.last else cell_id(cell))
        self.spots.append(spot)
        self.last = cell

    def read(self, line: str, spots: Sequence[Spot]) -> None:
        following = iter(spots)
        for character in line:
            if character != " ":
                self.point(next(following))
            self.write([*character.encode()])


def cells_of(spot: Spot, view: View | None = None) -> list[Cell]:
    """All cells that show a character well, that of its middle first, in the view of the last one.

    Args:
        view: of the cell pointed at last; None at the first of an answer.
    """
    views = [spot.best, *(other for other in spot.boxes if other != spot.best)]
    if view is not None:
        views = [view]
    found = []
    for one in views:
        box = spot.boxes[one]
        cells = [Cell(row, col, one) for row in box.rows for col in box.cols]
        middle = Cell(*box.middle, one)
        found += [middle, *(cell for cell in cells if cell != middle)]
    return found


def cell_id(cell: Cell) -> int:
    if cell.view is View.WHOLE:
        return shape.FIRST_CELL + ON_TILES + cell.row * COLUMNS[View.WHOLE] + cell.col
    return shape.FIRST_CELL + cell.row * COLUMNS[View.TILES] + cell.col


def cell_of(token: int) -> Cell | None:
    """The cell that a token names; None if it is another token."""
    number = token - shape.FIRST_CELL
    if 0 <= number < ON_TILES:
        return Cell(*divmod(number, COLUMNS[View.TILES]))
    if ON_TILES <= number < len(shape.CELL_TOKENS):
        return Cell(*divmod(number - ON_TILES, COLUMNS[View.WHOLE]), View.WHOLE)
    return None
