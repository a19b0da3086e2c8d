"""JSON that means one thing: without repeated keys, and with finite numbers only.

JSON's parsers keep one of two values of a repeated key, and not all the same one. A proxy may
therefore have checked another request than the one that is answered.
"""

from __future__ import annotations

import math
from typing import Any

from smolstack.unique_keys import RepeatedKeyError, read_unique

MOST_VALUES = 100_000  # per body
_MAYBE_KEYS = tuple(b'"' + blank for blank in (b" ", b"\t", b"\r", b"\n"))


class StrictJsonError(ValueError):
    """JSON contains something that parsers treat differently.

    Attributes:
        place: the path of the value, or the repeated key.
    """

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


def read_text(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        StrictJsonError: as for :func:`check`, or it has too many values.
        ValueError, RecursionError: it is not valid JSON, or nested too deeply.
    """
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise StrictJsonError(f"it has more than {MOST_VALUES:,} values", "")
    found = _read(text)
    _count_pairs(found)
    return found


def check(found: Any, content: bytes) -> None:
    """Check a value that was parsed from ``content`` by a parser that keeps the last of repeated
    keys and accepts any number.

    Raises:
        StrictJsonError: a key is repeated, a number is not finite, or a text has half a surrogate
            pair.
    """
    pairs = _count_pairs(found)
    # Strings may contain what looks like a key, and blanks may follow one; otherwise, it is certain
    # that no key is missing.
    if content.count(b'":') != pairs or any(each in content for each in _MAYBE_KEYS):
        _read(content)


def _read(text: str | bytes) -> Any:
    try:
        return read_unique(text)
    except RepeatedKeyError as error:
        raise StrictJsonError(str(error), error.key) from None


def _count_pairs(found: Any) -> int:
    """Return the number of keys in all objects."""
    pairs, left = 0, [found]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            pairs += len(value)
            left += value
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif _fault(value):
            place = _place(found)
            raise StrictJsonError(f"{place or 'the value'} {_fault(value)}", place)
    return pairs


def _fault(value: Any) -> str:
    """Return what is wrong with a number or a text; empty if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, expected a finite number"
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "is not valid Unicode: it contains a lone surrogate"
    return ""


def _place(found: Any) -> str:
    """Return the path of the first faulty value, or of the object that has a faulty key."""
    left: list[tuple[str, Any]] = [("", found)]
    while left:
        place, value = left.pop()
        if isinstance(value, dict):
            if any(map(_fault, value)):
                return f"a key of {place[1:] or 'the body'}"
            left += [(f"{place}.{key}"[-200:], each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{place}.{number}"[-200:], each) for number, each in enumerate(value)]
        elif _fault(value):
            return place[1:]
    return ""
