"""Checks the types of keyword options before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from smolstack.errors import SmolstackError


@dataclass(frozen=True)
class OptionType:
    """What an option accepts: in words, as a predicate, and what accepted values become."""

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


def check_option_types(
    given: Mapping[str, Any], types: Mapping[str, OptionType], error: type[SmolstackError]
) -> dict[str, Any]:
    """Return the options with Python's own numbers instead of NumPy's; without those that are
    None, which stands for the default. Raise ``error`` for the first one of another type.
    """
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        found[name] = value
        if name in types:
            try:
                accepted = types[name].accepts(value)
                found[name] = types[name].convert(value) if accepted else value
            except OverflowError:  # an integer that no float can hold
                accepted = False
            if not accepted:
                raise error(f"{name} is {value!r:.80}, expected {types[name].expected}")
    return found


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


def _is_flag(value: Any) -> bool:
    kind = type(value)
    return isinstance(value, bool) or (kind.__module__ == "numpy" and "bool" in kind.__name__)


def _are_token_numbers(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    ids = all(_is_whole(key) or (_is_text(key) and key.isdecimal()) for key in value)
    once = ids and len({int(key) for key in value}) == len(value)  # not "5" and "05"
    return once and all(map(_is_number, value.values()))


WHOLE_NUMBER = OptionType("a whole number", _is_whole, int)
NUMBER = OptionType("a number", _is_number, float)
FLAG = OptionType("True or False", _is_flag, bool)
TEXT = OptionType("text", _is_text)
TEXTS = OptionType("text or a list of texts", _one_or_several(_is_text))
TOKEN_IDS = OptionType(
    "a token id or a list of them",
    _one_or_several(_is_whole),
    lambda value: (int(value),) if _is_whole(value) else tuple(map(int, value)),
)
TOKEN_NUMBERS = OptionType(
    "a mapping from token ids to numbers",
    _are_token_numbers,
    lambda value: {int(key): float(number) for key, number in value.items()},
)
