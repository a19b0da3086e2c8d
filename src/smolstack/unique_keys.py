"""Reads JSON objects whose keys differ: parsers keep one of two values of a repeated key."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKeyError(ValueError):
    """An object of a JSON text has a key more than once; ``key`` names it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"an object has the key {key!r:.80} more than once")
        self.key = key


def read_unique(text: str | bytes) -> Any:
    """Return the value of JSON text.

    Raises:
        RepeatedKeyError: an object has a key more than once.
        ValueError, RecursionError: it is not valid JSON, or nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RepeatedKeyError(key)
            seen.add(key)
    return made
