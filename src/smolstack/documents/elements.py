"""Parses a page's DocTags into a tree of elements, whatever the model generated.

The tags are those of docling-core (Nassar et al. 2025, SmolDocling). A model's answer may be cut
off in the middle of an element, leave one open, close one that was never opened, or contain ``<``
and ``>`` that belong to no tag. All of that is accepted: every character that is not part of a tag
is kept as text of the enclosing element.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from smolstack.documents.doctags import (
    CELLS,
    CLASSES,
    CONTAINERS,
    FIGURES,
    LEAVES,
    LISTS,
    PAIR,
    PASSED_OVER,
    TABLES,
    TAKEN_AS,
    is_tag,
)

# The models' control tokens: an answer that keeps special tokens ends with one.
CONTROL = re.compile(
    r"<\|[a-z_]+\|>|<end_of_utterance>|<fake_token_around_image>|<image>|<global-img>"
)
TAG = re.compile(
    r"<(?P<close>/?)(?P<name>[a-z][a-z_]*(?:_[0-9]+)?)>|<(?P<language>_[^<>\s]{1,24}_)>"
)
# An incomplete tag at the end, where a tag of several tokens was cut off.
CUT_TAG = re.compile(r"</?[a-z_]{2,}[0-9]*$")


@dataclass
class Element:
    """An element of a page.

    Attributes:
        name: name of its tag.
        corners: from its ``<loc_…>`` tags: left, top, right, bottom in 500ths of the page.
        children: text, cells of a table as (kind, text), and other elements.
        kind: the language of code, or the class of an image, as in its tag.
    """

    name: str
    corners: list[int] = field(default_factory=list)
    children: list[str | Cell | Element] = field(default_factory=list)
    kind: str | None = None

    @property
    def text(self) -> str:
        """Return its own text, without that of cells and child elements."""
        return "".join(child for child in self.children if isinstance(child, str))

    def elements(self) -> Iterator[Element]:
        """Yield its child elements."""
        return (child for child in self.children if isinstance(child, Element))


@dataclass
class Cell:
    """A cell of a table; with kind "nl" the end of a row."""

    kind: str
    text: str = ""


@dataclass(frozen=True)
class _Token:
    text: str  # as generated
    name: str | None = None  # None for text
    close: bool = False


def read(answer: str) -> Element:
    """Return the elements of a page, as children of an element that represents the page."""
    tokens = list(_tokens(answer))
    return _Reader(tokens).page()


def _tokens(answer: str) -> Iterator[_Token]:
    answer = CONTROL.sub("", answer)
    cut = CUT_TAG.search(answer)
    if cut and any(known.startswith(cut[0].strip("</")) for known in _known()):
        answer = answer[: cut.start()]
    end = 0
    for match in TAG.finditer(answer):
        name = match["name"] or match["language"]
        if not (match["language"] or is_tag(name)):
            continue
        if match.start() > end:
            yield _Token(answer[end : match.start()])
        yield _Token(match[0], TAKEN_AS.get(name, name), bool(match["close"]))
        end = match.end()
    if end < len(answer):
        yield _Token(answer[end:])


def _known() -> Iterator[str]:
    yield from (*CONTAINERS, *LEAVES, *PASSED_OVER, *CELLS, "loc_0")


class _Reader:
    """Reads tokens in order, with a stack of open elements."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.stack = [Element("page")]
        self.at = 0
        self.places: dict[str, list[int]] = {}
        for place, token in enumerate(tokens):
            if token.name is not None:
                self.places.setdefault(token.name, []).append(place)

    @property
    def top(self) -> Element:
        return self.stack[-1]

    def page(self) -> Element:
        for at, token in enumerate(self.tokens):
            self.at = at
            if token.name is None:
                self._text(token.text)
            elif self.top.name == "code" and self._closes_later("code"):
                self._in_code(token)
            else:
                self._tag(token, token.name)
        return self.stack[0]

    def _closes_later(self, name: str) -> bool:
        """Return whether the next tag of this name closes it."""
        places = self.places.get(name, [])  # an implied element has none
        following = bisect_right(places, self.at - 1)
        return following < len(places) and self.tokens[places[following]].close

    def _in_code(self, token: _Token) -> None:
        """Code may contain any text, including tags."""
        name = token.name or ""
        if name == "code":
            self.stack.pop()
        elif not self.top.children and name.startswith(("loc_", "_")):
            self._tag(token, name)
        else:
            self._text(token.text)

    def _tag(self, token: _Token, name: str) -> None:
        if name in PASSED_OVER:
            return
        if token.close:
            self._close(token, name)
        elif name.startswith("loc_"):
            if not self.top.children and len(self.top.corners) < 4:
                self.top.corners.append(int(name[4:]))
        elif name in CELLS:
            self._cell(name)
        elif name.startswith("_"):
            self._kind(token, name, self.top.name == "code" and not self.top.text.strip())
        elif name in CLASSES and (name not in CONTAINERS or self.top.name == "picture"):
            self._kind(token, name, self.top.name in FIGURES)
        elif PAIR.fullmatch(name) or name.startswith("link_"):
            self._pair(token, name)
        else:
            self._open(name)

    def _kind(self, token: _Token, name: str, fits: bool) -> None:
        if fits:
            self.top.kind = self.top.kind or name
        else:
            self._text(token.text)

    def _text(self, text: str) -> None:
        top = self.top
        last = top.children[-1] if top.children else None
        if isinstance(last, Cell) and last.kind != "nl":
            last.text += text
        elif isinstance(last, Cell) and text.strip():
            top.children.append(Cell("fcel", text))
        elif text.strip() or top.children:
            top.children.append(text)

    def _push(self, name: str) -> None:
        element = Element(name)
        self.top.children.append(element)
        self.stack.append(element)

    def _close(self, token: _Token, name: str) -> None:
        names = [element.name for element in self.stack]
        if name in names[1:]:
            del self.stack[len(names) - 1 - names[::-1].index(name) :]
        elif name in LEAVES and self.top.name in LEAVES:
            if not self._closes_later(self.top.name):
                self.stack.pop()  # opening and closing names differ
        elif name not in CONTAINERS and name not in LEAVES and not PAIR.fullmatch(name):
            self._text(token.text)

    def _cell(self, name: str) -> None:
        while self.top.name in LEAVES:
            self.stack.pop()
        if self.top.name not in TABLES and self.top.name != "picture":
            while len(self.stack) > 1:
                self.stack.pop()
            self._push("otsl")
        self.top.children.append(Cell(name))

    def _pair(self, token: _Token, name: str) -> None:
        """Read the keys and values of a form."""
        if not any(element.name == "key_value_region" for element in self.stack):
            self._text(token.text)
        elif name.startswith("link_"):
            self.top.children.append(Element(name))
        else:
            while self.top.name != "key_value_region":
                self.stack.pop()
            self._push(name)

    def _open(self, name: str) -> None:
        """Open an element in a suitable place; elements that cannot contain it are closed first."""
        if self._stays_open(name):
            return
        while len(self.stack) > 1 and not self._holds(self.top.name, name):
            if self.top.name in CONTAINERS and name in LEAVES and self._closes_later(self.top.name):
                return self._stray(name)
            self.stack.pop()
        if name in TABLES and self.top.name in FIGURES:
            return  # the table of a chart
        self._push(name)

    def _stays_open(self, name: str) -> bool:
        """Return whether this is markup within an element's text; its text then belongs to the
        element.
        """
        top = self.top.name
        words = top in LEAVES or PAIR.fullmatch(top) is not None
        inner = name == "inline" or (name in LEAVES and name != "list_item")
        return words and inner and name != top and self._closes_later(top)

    def _stray(self, name: str) -> None:
        """Handle an element in a list, table or image that does not allow it: its text is kept."""
        if self.top.name in LISTS:
            self._push("list_item")

    @staticmethod
    def _holds(holder: str, name: str) -> bool:
        if holder in LISTS:
            return name == "list_item" or name in LISTS
        if holder == "inline":
            return name in LEAVES and name != "list_item"
        if holder in FIGURES:
            return name in ("caption", *TABLES)
        return holder in TABLES and name == "caption"
