"""JSON that means one thing: without repeated keys, and with finite numbers only.

JSON's parsers keep one of two values of a repeated key, and not all the same one. A proxy may
therefore have checked another request than the one that is answered.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_KEY = re.compile(rb'"[ \t\r\n]*:')


class StrictJsonError(ValueError):
    """JSON contains something that parsers treat differently."""


def read_text(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        StrictJsonError: a key is repeated, or a number is not finite.
        ValueError, RecursionError: it is not valid JSON, or nested too deeply.
    """
    return json.loads(
        text, object_pairs_hook=_object, parse_constant=_refuse_number, parse_float=_finite
    )


def check(found: Any, content: bytes) -> None:
    """Check a value that was parsed from ``content`` by a parser that keeps the last of repeated
    keys and accepts any number.

    Raises:
        StrictJsonError: a key is repeated, or a number is not finite.
    """
    pairs, left = 0, [found]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            pairs += len(value)
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, float) and not math.isfinite(value):
            raise StrictJsonError(f"it contains the number {value}, expected finite numbers")
    # Strings may contain what looks like a key, so that only equal counts are certain.
    if sum(1 for _ in _KEY.finditer(content)) != pairs:
        json.loads(content, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in made if names.count(name) > 1)
        raise StrictJsonError(f"an object has the key {repeated!r:.80} more than once")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _refuse_number(text[:20])
    return number


def _refuse_number(text: str) -> None:
    raise StrictJsonError(f"it contains the number {text}, expected finite numbers")
