"""Repairs DocTags so that docling-core reads them completely: elements closed, boxes valid.

docling-core drops the content of an element that is not closed, takes ``<`` to ``>`` for a tag, and
raises if a box is empty, a row is shorter than the one above, or a text cell has no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smolstack.documents.doctags import FIGURES, LISTS, TABLES
from smolstack.documents.elements import Cell, Element, read

UNITS = 500  # per side of the page, in <loc_…>
# Private use characters replace < and > in text until docling-core has finished.
LESS, GREATER = "\ue0f1", "\ue0f2"
TO_PRIVATE = str.maketrans("<>", LESS + GREATER)
FROM_PRIVATE = str.maketrans(LESS + GREATER, "<>")
EMPTY, FILLED = "ecel", "fcel"


@dataclass(frozen=True)
class Repaired:
    """A page that docling-core can read.

    Attributes:
        tags: DocTags, with private use characters for ``<`` and ``>`` in text.
        elements: number of elements with text, cells or a box.
        boxes: number of boxes left out because they are empty, inverted or outside the page.
        words: the plain text, as a last resort.
    """

    tags: str
    elements: int
    boxes: int
    words: str


def repair(answer: str, size: tuple[int, int] | None = None, *, boxes: bool = True) -> Repaired:
    """Repair a page's generated tags so that docling-core reads them completely.

    Args:
        answer: the model's answer, including special tokens.
        size: (width, height) of the page's image in pixels, if figures are cropped from it.
        boxes: False leaves out all boxes.
    """
    writer = _Writer(size, boxes)
    page = read(answer)
    parts = [part for child in page.children for part in writer.root(child)]
    elements = len(parts) - writer.loose
    if not elements:
        return Repaired("<doctag></doctag>", 0, writer.dropped, page.text.strip())
    words = "\n".join(_words(page))
    return Repaired("<doctag>" + "\n".join(parts) + "</doctag>", elements, writer.dropped, words)


def plain(words: str) -> str:
    """Return a page that contains only text."""
    lines = [f"<text>{_escaped(line)}</text>" for line in words.splitlines() if line.strip()]
    return "<doctag>" + "\n".join(lines) + "</doctag>"


def _escaped(text: str) -> str:
    return text.translate(TO_PRIVATE).strip()


def _words(element: Element) -> Iterator[str]:
    for child in element.children:
        if isinstance(child, Element):
            yield from _words(child)
        else:
            text = child.text if isinstance(child, Cell) else child
            if text.strip():
                yield text.strip()


def _tagged(name: str, inner: str, head: str = "") -> str:
    return f"<{name}>{head}{inner}</{name}>"


class _Writer:
    """Writes the elements of a page's root, and counts what it leaves out."""

    def __init__(self, size: tuple[int, int] | None, boxes: bool) -> None:
        self.size = size
        self.boxes = boxes
        self.dropped = 0
        self.loose = 0

    def root(self, child: str | Cell | Element) -> Iterator[str]:
        """Yield the tags of a child of the page's root; nothing if it is empty."""
        if not isinstance(child, Element):
            text = _escaped(child if isinstance(child, str) else child.text)
            if text:
                self.loose += 1
                yield _tagged("text", text)
        elif child.name in LISTS:
            items = "\n".join(self._items(child))
            if items:
                yield _tagged(child.name, f"\n{items}\n")
        elif child.name in (*TABLES, *FIGURES):
            yield from self._figure(child)
        elif child.name == "inline":
            inner = "".join(part for each in child.children for part in self._inline(each))
            if inner:
                yield _tagged("inline", inner)
        elif child.name == "key_value_region":
            pairs = "".join(self._pair(pair) for pair in child.elements())
            if pairs:
                yield _tagged(child.name, pairs, self._box(child))
            if child.text.strip():
                yield _tagged("text", _escaped(child.text))
        elif child.name == "list_item":
            yield from self.root(Element("unordered_list", children=[child]))
        else:
            yield from self._leaf(child)

    def _leaf(self, element: Element, box: bool = True) -> Iterator[str]:
        text = _escaped(element.text)
        head = self._box(element) if box else ""
        if text or head:
            kind = f"<{element.kind}>" if element.kind else ""
            yield _tagged(element.name, text, head + kind)

    def _inline(self, child: str | Cell | Element) -> Iterator[str]:
        if isinstance(child, Element):
            yield from self._leaf(child)
        elif isinstance(child, str) and child.strip():
            yield _tagged("text", _escaped(child))

    def _items(self, holder: Element) -> Iterator[str]:
        """Yield the items of a list, including those of nested lists: docling-core reads flat
        lists.
        """
        for child in holder.children:
            if isinstance(child, str):
                if child.strip():
                    yield _tagged("list_item", _escaped(child))
            elif isinstance(child, Element) and child.name in LISTS:
                yield from self._items(child)
            elif isinstance(child, Element):
                yield from self._leaf(child)

    def _figure(self, element: Element) -> Iterator[str]:
        """Yield a table, chart or image, its caption, and text in an image that belongs to no
        element.
        """
        cells = [child for child in element.children if isinstance(child, Cell)]
        head = self._box(element, cut=element.name in FIGURES)
        captions = [
            part.replace("\n", " ")
            for caption in element.elements()
            for part in self._leaf(caption)
        ]
        rows = "".join(_row(row) + "<nl>" for row in _rows(cells))
        name = element.name
        if cells or name == "document_index":
            # docling-core drops a chart without a box, including its table, and does not accept an
            # index.
            name = "chart" if name in FIGURES and head else "otsl"
        if not head and (rows or captions):
            # Without a box, docling-core would use the caption's.
            yield from captions
            captions = []
        kind = f"<{element.kind}>" if element.kind and name in FIGURES else ""
        if rows or head:
            yield _tagged(name, "".join(captions) + rows, head + kind)
        if element.text.strip():
            yield _tagged("text", _escaped(element.text))

    def _pair(self, pair: Element) -> str:
        links = "".join(f"<{link.name}>" for link in pair.elements())
        return _tagged(pair.name, _escaped(pair.text) + links, self._box(pair))

    def _box(self, element: Element, cut: bool = False) -> str:
        """Return an element's box as tags; empty if the box is invalid."""
        if not element.corners:
            return ""
        if not self._is_place(element.corners, cut):
            self.dropped += 1
            return ""
        if not self.boxes:
            return ""
        return "".join(f"<loc_{corner}>" for corner in element.corners)

    def _is_place(self, corners: list[int], cut: bool) -> bool:
        if len(corners) != 4 or max(corners) > UNITS:
            return False
        left, top, right, bottom = corners
        if cut and self.size is not None:
            width, height = self.size
            left, right = (int(side / UNITS * width) for side in (left, right))
            top, bottom = (int(side / UNITS * height) for side in (top, bottom))
        return left < right and top < bottom


def _rows(cells: list[Cell]) -> list[list[Cell]]:
    """Return rows of equal length: docling-core accesses the cells below and to the right."""
    rows: list[list[Cell]] = [[]]
    for cell in cells:
        if cell.kind == "nl":
            rows.append([])
        else:
            rows[-1].append(cell)
    rows = [row for row in rows if row]
    width = max((len(row) for row in rows), default=0)
    return [
        [_settled(cell, first=not down, left=not across) for across, cell in enumerate(row)]
        + [Cell(EMPTY)] * (width - len(row))
        for down, row in enumerate(rows)
    ]


def _settled(cell: Cell, *, first: bool, left: bool) -> Cell:
    """Return a cell whose kind and text are consistent."""
    text = _escaped(cell.text)
    if cell.kind in ("lcel", "ucel", "xcel"):
        if text:
            return Cell(FILLED, text)
        reaches_out = (cell.kind != "ucel" and left) or (cell.kind != "lcel" and first)
        return Cell(EMPTY) if reaches_out else cell
    if not text:
        return Cell(EMPTY)
    return Cell(FILLED if cell.kind == EMPTY else cell.kind, text)


def _row(cells: list[Cell]) -> str:
    return "".join(f"<{cell.kind}>{_escaped(cell.text)}" for cell in cells)
