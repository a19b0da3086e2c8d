"""Checks the types of keyword options before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from smolstack.errors import SmolstackError


@dataclass(frozen=True)
class OptionType:
    """What an option accepts: in words, and as a predicate."""

    expected: str
    accepts: Callable[[Any], bool]


def check_option_types(
    given: Mapping[str, Any], types: Mapping[str, OptionType], error: type[SmolstackError]
) -> None:
    """Raise ``error`` for the first option of another type; None stands for the default."""
    for name, value in given.items():
        if value is not None and name in types and not types[name].accepts(value):
            raise error(f"{name} is {value!r:.80}, expected {types[name].expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _one_or_several(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if accepts(value):
            return True
        several = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return several and all(accepts(item) for item in value)

    return check


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


WHOLE_NUMBER = OptionType("a whole number", _is_whole)
NUMBER = OptionType("a number", _is_number)
FLAG = OptionType("True or False", lambda value: isinstance(value, bool))
TEXT = OptionType("text", _is_text)
TEXTS = OptionType("text or a list of texts", _one_or_several(_is_text))
TOKEN_IDS = OptionType("a token id or a list of them", _one_or_several(_is_whole))
TOKEN_NUMBERS = OptionType(
    "a mapping from token ids to numbers", lambda value: isinstance(value, Mapping)
)
