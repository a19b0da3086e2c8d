"""Function calls in answers: the text form that they have, and what an answer's text holds of it.

A call is written ``<tool_call>{"name": "…", "arguments": {…}}</tool_call>``, several one after
another. The grammar (grammar.py) lets a model write nothing else where it begins a call, and the
arguments satisfy the function's JSON Schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 8  # of one answer
_HEAD = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')


@dataclass(frozen=True)
class Function:
    """A function that a model may call.

    Attributes:
        parameters: a JSON Schema of an object.
    """

    name: str
    parameters: Mapping[str, Any] | bool
    description: str = ""


@dataclass(frozen=True)
class ToolCalls:
    """Answers that may be, or have to be, calls of functions.

    Attributes:
        required: the answer is a call; otherwise it may be a text too.
        several: up to :data:`MOST_CALLS` calls.
        text: a JSON Schema that an answer which is no call satisfies; None: any text.
    """

    functions: tuple[Function, ...]
    required: bool = False
    several: bool = False
    text: Mapping[str, Any] | bool | None = None


@dataclass(frozen=True)
class Call:
    """One call; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


def describe(functions: tuple[Function, ...]) -> str:
    """What a model without a template for tools is told of its functions."""
    lines = [
        json.dumps(
            {"name": f.name, "description": f.description, "parameters": f.parameters},
            ensure_ascii=False,
        )
        for f in functions
    ]
    return (
        "You can call these functions:\n"
        + "\n".join(lines)
        + f'\nTo call one, answer {OPEN}{{"name": "…", "arguments": {{…}}}}{CLOSE}.'
    )


def written(name: str, arguments: str) -> str:
    """A call as text."""
    return f'{OPEN}{{"name": {json.dumps(name)}, "arguments": {arguments}}}{CLOSE}'


@dataclass(frozen=True)
class Began:
    """A call began: the ``index``-th of the answer."""

    index: int
    name: str


@dataclass(frozen=True)
class Continued:
    """More characters of a call's arguments."""

    index: int
    arguments: str


Event: TypeAlias = "str | Began | Continued"


class CallReader:
    """Splits an answer, as it grows, into text and calls.

    Attributes:
        calls: those that are complete.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._rest, self._name, self._arguments = "", "", ""
        self._state = "start"  # start, text, head, arguments, tail
        self._scan = _ObjectScan()

    def read(self, piece: str) -> list[Event]:
        """What became certain with these characters: text, or parts of calls."""
        self._rest += piece
        found: list[Event] = []
        steps = {
            "start": self._start,
            "text": self._text,
            "head": self._head,
            "arguments": self._read_arguments,
            "tail": self._tail,
        }
        while steps[self._state](found):
            pass
        return found

    def end(self) -> list[Event]:
        """What is left when the answer ends: text that began like a call and was none."""
        rest, self._rest = self._rest, ""
        return [rest] if rest and self._state in ("start", "text") and not self.calls else []

    # Each step takes what it can from the rest; False: more characters are needed.

    def _start(self, _: list[Event]) -> bool:
        waiting = self._rest.lstrip() if self.calls else self._rest
        if waiting.startswith(OPEN):
            self._rest, self._state = waiting[len(OPEN) :], "head"
        elif waiting and not OPEN.startswith(waiting) and not self.calls:
            self._state = "text"
        else:
            return False
        return True

    def _text(self, found: list[Event]) -> bool:
        if self._rest:
            found.append(self._rest)
            self._rest = ""
        return False

    def _head(self, found: list[Event]) -> bool:
        head = _HEAD.match(self._rest)
        if head is None:
            return False
        self._name, self._rest = json.loads(head[1]), self._rest[head.end() :]
        self._arguments, self._scan, self._state = "", _ObjectScan(), "arguments"
        found.append(Began(len(self.calls), self._name))
        return True

    def _read_arguments(self, found: list[Event]) -> bool:
        taken = self._scan.take(self._rest)
        if taken:
            part, self._rest = self._rest[:taken], self._rest[taken:]
            self._arguments += part
            found.append(Continued(len(self.calls), part))
        if self._scan.complete:
            self._state = "tail"
        return self._scan.complete

    def _tail(self, _: list[Event]) -> bool:
        tail = "}" + CLOSE
        if not self._rest.startswith(tail):
            return False
        self._rest, self._state = self._rest[len(tail) :], "start"
        self.calls.append(Call(self._name, self._arguments))
        return True


class _ObjectScan:
    """Finds where a JSON object ends, a few characters at a time."""

    def __init__(self) -> None:
        self.depth, self.complete = 0, False
        self._in_string = self._escaped = False

    def take(self, text: str) -> int:
        """How many of these characters belong to the object."""
        if self.complete:
            return 0
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.complete = True
                    return place + 1
        return len(text)


def split(text: str) -> tuple[str, list[Call]]:
    """The text of a whole answer, and its calls; one that was cut off is left out."""
    reader = CallReader()
    events = [*reader.read(text), *reader.end()]
    return "".join(event for event in events if isinstance(event, str)), reader.calls
