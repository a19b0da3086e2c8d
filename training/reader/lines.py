"""Set lines of text: where each character of a line stands, and how the line is drawn."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import ImageDraw, ImageFont

Corners = tuple[tuple[float, float], ...]


@lru_cache(maxsize=512)
def open_font(path: str, em: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, em, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=65536)
def _box(path: str, character: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a character's ink around its origin on the baseline, per em."""
    left, top, right, bottom = open_font(path, 100).getbbox(character, anchor="ls")
    return left / 100, top / 100, right / 100, bottom / 100


@dataclass(frozen=True)
class Line:
    """One line of text, set in one font.

    Attributes:
        text: what it says.
        path, em: the font.
        starts: for each character, spaces included, where its origin stands on the baseline.
        width, height: of the line's ink, in pixels.
        left, ascent: where the ink starts from the first origin, and how high it rises.
        x, y: where the ink's upper left corner stands.
    """

    text: str
    path: str
    em: int
    starts: tuple[float, ...]
    width: float
    height: float
    left: float
    ascent: float
    tracked: bool
    x: float = 0.0
    y: float = 0.0

    @property
    def characters(self) -> str:
        """The visible characters."""
        return self.text.replace(" ", "")

    @property
    def gaps(self) -> tuple[bool, ...]:
        """For each visible character, whether a space follows."""
        following = (*self.text[1:], "")
        return tuple(
            then == " " for one, then in zip(self.text, following, strict=True) if one != " "
        )

    @property
    def corners(self) -> tuple[Corners, ...]:
        """Corners of the visible characters' ink: upper left, upper right, lower right and left."""
        x, y = self.x - self.left, self.y + self.ascent
        found = []
        for character, start in zip(self.text, self.starts, strict=True):
            if character == " ":
                continue
            left, top, right, bottom = (part * self.em for part in _box(self.path, character))
            west, east, north, south = x + start + left, x + start + right, y + top, y + bottom
            found.append(((west, north), (east, north), (east, south), (west, south)))
        return tuple(found)

    def at(self, x: float, y: float) -> Line:
        """The same line at another place."""
        return replace(self, x=x, y=y)

    def draw(
        self, draw: ImageDraw.ImageDraw, origin: tuple[int, int], fill: int | tuple[int, int, int]
    ) -> None:
        """Draw the line, its place counted from ``origin``."""
        font = open_font(self.path, self.em)
        x, y = origin[0] + self.x - self.left, origin[1] + self.y + self.ascent
        if not self.tracked:
            draw.text((x, y), self.text, fill, font=font, anchor="ls")
            return
        for character, start in zip(self.text, self.starts, strict=True):
            draw.text((x + start, y), character, fill, font=font, anchor="ls")


def set_line(text: str, path: str, em: int, tracking: float = 0.0) -> Line:
    """Set ``text`` at 0, 0; ``tracking`` is added between characters, in em."""
    font = open_font(path, em)
    if tracking:
        starts, x = [], 0.0
        for character in text:
            starts.append(x)
            x += font.getlength(character) + tracking * em
    else:
        starts = _starts(font, text)
    boxes = [_box(path, character) for character in text]
    left = min(start + box[0] * em for start, box in zip(starts, boxes, strict=True))
    right = max(start + box[2] * em for start, box in zip(starts, boxes, strict=True))
    ascent = -min(-0.5, *(box[1] for box in boxes)) * em
    descent = max(0.05, *(box[3] for box in boxes)) * em
    return Line(
        text, path, em, tuple(starts), right - left, ascent + descent, left, ascent, bool(tracking)
    )


def _starts(font: ImageFont.FreeTypeFont, text: str) -> list[float]:
    """Where each character of a line starts: how long all before it are together.

    Taken two by two, since what a character adds hangs on the one before it alone (kerning); to
    measure every beginning of the line would take four times as long.
    """
    own = {character: font.getlength(character) for character in set(text)}
    starts, x = [0.0], own[text[0]]
    for first, second in itertools.pairwise(text):
        starts.append(x)
        x += font.getlength(first + second) - own[first]
    return starts


def moved(corners: tuple[Corners, ...], by: tuple[float, float]) -> tuple[Corners, ...]:
    return tuple(tuple((x + by[0], y + by[1]) for x, y in box) for box in corners)


def turned(
    corners: tuple[Corners, ...], block: tuple[int, int], angle: float
) -> tuple[Corners, ...]:
    """Corners on a block that is turned by ``angle`` degrees, as Pillow turns with ``expand``."""
    if not angle:
        return corners
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    wide, high = (
        abs(cos) * block[0] + abs(sin) * block[1],
        abs(sin) * block[0] + abs(cos) * block[1],
    )
    old, new = (block[0] / 2, block[1] / 2), (wide / 2, high / 2)
    return tuple(
        tuple(
            (
                (x - old[0]) * cos + (y - old[1]) * sin + new[0],
                (y - old[1]) * cos - (x - old[0]) * sin + new[1],
            )
            for x, y in box
        )
        for box in corners
    )
