"""Limits on the time and memory that a grammar takes before its first token.

A short regular expression can stand for a long text (``(a{1000}){1000}``), and a short schema for a
huge automaton: llguidance decides whether the intersection of patterns, or of ``multipleOf``, is
empty without a limit of its own. The first is measured on the expression; for the second, the
grammar is built in a process with limited time and memory before it is built in this one.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from smolstack.errors import GenerationError, ImageError
from smolstack.processor import limited_process

MAX_LITERALS = 10_000
TRIAL_SECONDS = 2  # of processor time
TRIAL_BYTES = 16 * 2**20  # that a grammar may hold until its first token
_ALLOCATED = 256 * 2**20  # at most, in between
_REMEMBERED = 1000
# Keywords of JSON Schema whose combinations are intersections of regular languages.
INTERSECTING = frozenset({"allOf", "multipleOf", "pattern", "patternProperties"})
_KEYWORD = re.compile(rf'"({"|".join(sorted(INTERSECTING))})"\s*:')
_PATTERN = re.compile(r'"pattern"\s*:\s*("(?:\\.|[^"\\])*")')
_LITERAL_OF_LARK = re.compile(
    r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/((?:\\.|[^/\\\n])+)/'
)  # strings and comments are skipped
_REPEATED = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")
_ESCAPE = re.compile(r"\\(?:[pPxuU]\{[^}]*\}|.)", re.DOTALL)
_CLASS_ESCAPES = frozenset("dDwWsS")
_FLAGS = re.compile(r"\(\?(?:P?<[^>]*>|[a-zA-Z-]*:?)")
_VERBOSE = re.compile(r"\(\?[a-wyz]*x")
_BLANK = re.compile(r"(\\.|\[(?:\\.|[^\]\\])*\])|#[^\n]*|\s+", re.DOTALL)
_WIDE = 1 / 16  # weight of a set of several characters, in which no text is determined
_HUGE = 1e15
_tried: OrderedDict[str, str | None] = OrderedDict()
_lock = threading.Lock()


def literals(pattern: str) -> float:
    """Return the length of a regular expression whose repetitions are written out: each character
    counts as one, a set of characters as a sixteenth.

    The pattern need not be valid; llguidance says what is wrong with one that is not.
    """
    if _VERBOSE.search(pattern):
        pattern = _BLANK.sub(lambda found: found[1] or "", pattern)
    # The lengths of the enclosing groups before each open one; the present sequence, its last item.
    outer: list[tuple[float, float]] = []
    total = last = 0.0
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "(":
            outer.append((total, last))
            total = last = 0.0
            found = _FLAGS.match(pattern, place)
            place = found.end() if found else place + 1
            continue
        if char == ")" and outer:
            last, total = total + last, outer[-1][0] + outer[-1][1]
            outer.pop()
        elif char == "{" and (found := _REPEATED.match(pattern, place)):
            most = max(int(digits[:15]) for digits in (found[1], found[3], "1") if digits)
            last = min(last * max(1, most), _HUGE)
            place = found.end()
            continue
        elif char not in "*+?|":
            end, weight = _atom(pattern, place)
            total, last, place = total + last, weight, end
            continue
        place += 1
    return total + last + sum(before + item for before, item in outer)


def _atom(pattern: str, place: int) -> tuple[int, float]:
    """Return the end of a character, an escape or a set of characters, and its weight."""
    char = pattern[place]
    if char == ".":
        return place + 1, _WIDE
    if char == "\\":
        found = _ESCAPE.match(pattern, place)
        return (found.end(), _WIDE if found[0][1] in _CLASS_ESCAPES else 1.0) if found else (
            place + 1, 1.0
        )  # fmt: skip
    if char != "[":
        return place + 1, 1.0
    depth, end = 0, place
    while end < len(pattern):
        if pattern[end] == "\\":
            end += 1
        elif pattern[end] == "[":
            depth += 1
            end += pattern.startswith("^", end + 1)
            end += pattern.startswith("]", end + 1)  # the first one is a character
        elif pattern[end] == "]":
            depth -= 1
            if depth == 0:
                break
        end += 1
    inside = pattern[place + 1 : end]
    ranges = any(low < high for low, high in re.findall(r"([^\\\[])-([^\\\]])", inside))
    wide = "&&" not in inside and (
        inside.startswith("^") or ranges or re.search(r"\\[dDwWsS]", inside) is not None
    )
    return end + 1, _WIDE if wide else 1.0


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise GenerationError if regular expressions stand for more than MAX_LITERALS characters."""
    total = 0.0
    for pattern in patterns:
        total += literals(pattern)
        if total > MAX_LITERALS:
            length = f"{total:,.0f}" if total < _HUGE else "too many"
            raise GenerationError(
                f"the expression {pattern!r:.60} has {length} characters when its repetitions are "
                f"written out, at most {MAX_LITERALS:,} are supported"
            )


def patterns_in(text: str, *, lark: bool) -> list[str]:
    """Return the regular expressions of a schema's JSON text or of a grammar in Lark."""
    found = []
    for quoted in _PATTERN.findall(text):
        try:
            found.append(json.loads(quoted))
        except ValueError:
            continue
    if lark:
        found += [each for each in _LITERAL_OF_LARK.findall(text) if each]
    return found


def placed_patterns(schema: Any) -> Iterator[tuple[str, str]]:
    """Yield the regular expressions of a JSON Schema, each with its path in the schema."""
    left = [("", schema)]
    while left:
        place, value = left.pop()
        if not isinstance(value, (dict, list)):
            continue
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        below = [(f"{place}.{key}" if place else str(key), key, each) for key, each in items]
        for path, key, each in below:
            if key == "pattern" and isinstance(each, str):
                yield path, each
            elif key == "patternProperties" and isinstance(each, dict):
                yield from ((f"{path}.{pattern}", pattern) for pattern in each)
        left += [(path, each) for path, _, each in reversed(below)]


def needs_trial(text: str) -> bool:
    """Whether a schema's JSON text has keywords whose automaton may be far larger than itself."""
    return _KEYWORD.search(text) is not None


def try_grammar(grammar: str, name: str) -> None:
    """Build a grammar in a process of its own, once; llguidance's errors are left to the caller.

    Args:
        grammar: as llguidance's LLMatcher takes it.
        name: what the user calls it.

    Raises:
        GenerationError: it takes more than TRIAL_SECONDS or TRIAL_BYTES.
    """
    key = hashlib.sha256(grammar.encode()).hexdigest()
    with _lock:
        known, refusal = key in _tried, _tried.get(key)
    if not known:
        refusal = _trial(grammar, name)
        with _lock:
            _tried[key] = refusal
            while len(_tried) > _REMEMBERED:
                _tried.popitem(last=False)
    if refusal is not None:
        raise GenerationError(refusal)


def _trial(grammar: str, name: str) -> str | None:
    """Return why a grammar is refused, or None."""
    too_complex = (
        f"the {name} is too complex: preparing it takes more than {TRIAL_SECONDS} s or "
        f"{TRIAL_BYTES // 2**20} MiB; simplify its patterns, multipleOf, allOf or intersections"
    )
    try:
        answer, _ = limited_process.call(
            "smolstack.generation.grammar_process", {}, grammar.encode(),
            name=name, seconds=TRIAL_SECONDS, memory=_ALLOCATED,
        )  # fmt: skip
    except limited_process.ProcessFailedError as error:
        raise GenerationError(f"the {name} cannot be checked: {error}") from None
    except ImageError:
        return too_complex
    return too_complex if answer["bytes"] > TRIAL_BYTES else None
