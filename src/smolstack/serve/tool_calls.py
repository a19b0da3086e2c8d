"""Formats answers with function calls as OpenAI's chat completions."""

from __future__ import annotations

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from smolstack.generation.answer import Answer, TokenLogprob
from smolstack.generation.lark import CALL_BEGIN
from smolstack.serve.chat_completions import ChatCompletionWriter

_HEAD = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')


@dataclass
class Call:
    """A function call, possibly incomplete; complete ``arguments`` are valid JSON."""

    name: str
    arguments: str = ""
    complete: bool = False
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def whole(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass
class CallReader:
    """Parses an answer incrementally: either calls or text.

    Attributes:
        calls: the calls found so far.
    """

    calls: list[Call] = field(default_factory=list)
    _state: Literal["begin", "head", "arguments", "between", "text"] = "begin"
    _held: str = ""  # text that is not parsed yet
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False

    def push(self, piece: str) -> list[dict[str, Any]]:
        """Parse a piece of the answer; return OpenAI's deltas."""
        self._held += piece
        deltas: list[dict[str, Any]] = []
        while True:
            before = self._state
            deltas += getattr(self, f"_read_{before}")()
            if self._state == before:
                return deltas

    def finish(self) -> list[dict[str, Any]]:
        """Return the deltas at the end of the answer: text that only looked like a call."""
        left, self._held = self._held, ""
        return [{"content": left}] if left and not self.calls else []

    def _read_begin(self) -> list[dict[str, Any]]:
        begun = self._held.lstrip()
        if begun.startswith(CALL_BEGIN):
            self._state, self._held = "head", begun[len(CALL_BEGIN) :]
        elif not CALL_BEGIN.startswith(begun):
            self._state = "text"
        return []

    def _read_text(self) -> list[dict[str, Any]]:
        text, self._held = self._held, ""
        return [{"content": text}] if text else []

    def _read_head(self) -> list[dict[str, Any]]:
        head = _HEAD.match(self._held)
        if head is None:
            return []
        self._state, self._held = "arguments", self._held[head.end() :]
        call = Call(json.loads(head[1]))
        self.calls.append(call)
        return [{"tool_calls": [{"index": len(self.calls) - 1, **call.whole()}]}]

    def _read_arguments(self) -> list[dict[str, Any]]:
        end = self._end_of_arguments()
        piece, self._held = self._held[:end], self._held[end:]
        call = self.calls[-1]
        call.arguments += piece
        if self._state == "between":
            call.complete = True
        if not piece:
            return []
        part = {"index": len(self.calls) - 1, "function": {"arguments": piece}}
        return [{"tool_calls": [part]}]

    def _end_of_arguments(self) -> int:
        """Return how many characters of the unparsed text belong to the arguments."""
        for place, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "between"
                    return place + 1
        return len(self._held)

    def _read_between(self) -> list[dict[str, Any]]:
        _, found, after = self._held.partition(CALL_BEGIN)
        if found:
            self._state, self._held = "head", after
        return []


class ToolCallWriter(ChatCompletionWriter):
    """A chat completion whose answers may contain function calls."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._readers: dict[int, CallReader] = defaultdict(CallReader)

    def _message(self, answer: Answer) -> dict[str, Any]:
        reader = CallReader()
        reader.push(answer.text)
        calls = [call.whole() for call in reader.calls if call.complete]
        message = super()._message(answer)
        if not calls and not is_truncated(answer):
            return message
        # An incomplete call is left out: its arguments are not valid JSON.
        return {**message, "content": None, **({"tool_calls": calls} if calls else {})}

    def _reason(self, answer: Answer) -> str:
        reader = CallReader()
        reader.push(answer.text)
        called = bool(reader.calls) and answer.finish_reason == "stop"
        return "tool_calls" if called else super()._reason(answer)

    def chunks(
        self, index: int, piece: str, logprobs: Sequence[TokenLogprob] = ()
    ) -> list[dict[str, Any]]:
        deltas = self._readers[index].push(piece)
        if not deltas and logprobs:
            deltas = [{}]
        return [
            self._chunk(index, delta, () if number else logprobs)
            for number, delta in enumerate(deltas)
        ]

    def last_chunks(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        left = [] if is_truncated(answer) else self._readers[index].finish()
        made = [self._chunk(index, delta) for delta in left]
        return [*made, *super().last_chunks(index, answer)]


def is_truncated(answer: Answer) -> bool:
    """Whether an answer reached its maximum length within a call or its opening tag."""
    begun = answer.text.lstrip()
    called = begun.startswith(CALL_BEGIN) or (begun != "" and CALL_BEGIN.startswith(begun))
    return answer.finish_reason == "length" and called
