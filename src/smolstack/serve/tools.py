"""Function calling as OpenAI's API has it: a request's ``tools``, and the calls of an answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smolstack.generation import tool_calls
from smolstack.generation.tool_calls import Began, Continued, Function, ToolCalls
from smolstack.serve.error_responses import RefusedError

if TYPE_CHECKING:
    from smolstack.processor.prompt import ChatTemplate

_NAME = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FunctionDefinition(_Body):
    """A function that may be called; ``parameters`` is a JSON Schema of an object."""

    name: Annotated[str, _NAME]
    description: Annotated[str, Field(max_length=100_000)] = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Body):
    name: str


class ToolChoice(_Body):
    """The one function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(_Body):
    name: Annotated[str, _NAME]
    arguments: Annotated[str, Field(max_length=2_000_000)] = "{}"


class ToolCall(_Body):
    """A call that an assistant's earlier message made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


Choice = Literal["none", "auto", "required"] | ToolChoice


def wanted(
    tools: Sequence[Tool],
    choice: Choice | None,
    *,
    several: bool,
    closed: Any,
    text: Mapping[str, Any] | bool | None,
) -> ToolCalls | None:
    """What an answer may call; None: nothing.

    Args:
        several: more than one call is allowed.
        closed: makes a schema's objects hold the properties that it names alone.
        text: a JSON Schema that an answer which is no call satisfies.

    Raises:
        RefusedError: functions of one name, or a choice of one that is not there.
    """
    names = [tool.function.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RefusedError(400, f"tools has {twice[0]} twice, expected each once", param="tools")
    if isinstance(choice, ToolChoice) and choice.function.name not in names:
        raise RefusedError(
            400,
            f"tool_choice names {choice.function.name[:100]!r}, tools has {names or 'none'}",
            param="tool_choice",
        )
    if choice == "required" and not tools:
        raise RefusedError(400, "tool_choice is required, tools has none", param="tool_choice")
    if choice == "none" or not tools:
        return None
    chosen = [
        tool.function
        for tool in tools
        if not isinstance(choice, ToolChoice) or tool.function.name == choice.function.name
    ]
    functions = tuple(
        Function(one.name, closed(one.parameters or NO_ARGUMENTS), one.description)
        for one in chosen
    )
    required = choice == "required" or isinstance(choice, ToolChoice)
    return ToolCalls(functions, required, several and not isinstance(choice, ToolChoice), text)


def with_tools(
    messages: Sequence[Mapping[str, Any]], functions: ToolCalls | None, template: ChatTemplate
) -> list[dict[str, Any]]:
    """Messages as a checkpoint's template reads them.

    A template that knows tools is given calls and results as they are. For the others calls and
    results become text, and the functions are described in the system message.
    """
    if template.knows_tools:
        return [dict(message) for message in messages]
    made: list[dict[str, Any]] = []
    if functions is not None:
        said = {"type": "text", "text": tool_calls.describe(functions.functions)}
        if messages and messages[0]["role"] == "system":
            content = [*_parts(messages[0]["content"]), {"type": "text", "text": "\n\n"}, said]
            made.append({"role": "system", "content": content})
            messages = messages[1:]
        else:
            made.append({"role": "system", "content": [said]})
    for message in messages:
        parts = _parts(message["content"])
        for call in message.get("tool_calls", ()):
            one = call["function"]
            parts.append(
                {"type": "text", "text": tool_calls.written(one["name"], one["arguments"])}
            )
        role = message["role"]
        if role == "tool":
            role = "user"
            parts = [
                {"type": "text", "text": "<tool_response>"},
                *parts,
                {"type": "text", "text": "</tool_response>"},
            ]
        made.append({"role": role, "content": parts})
    return made


def described(functions: ToolCalls | None) -> list[dict[str, Any]]:
    """Functions in OpenAI's form, for a template that knows tools."""
    return [
        {
            "type": "function",
            "function": {
                "name": one.name,
                "description": one.description,
                "parameters": one.parameters,
            },
        }
        for one in (() if functions is None else functions.functions)
    ]


def message_of(text: str) -> dict[str, Any]:
    """An answer's message: its text, and its calls where it made some."""
    said, calls = tool_calls.split(text)
    message: dict[str, Any] = {"role": "assistant", "content": said or None, "refusal": None}
    if calls:
        message["tool_calls"] = [
            {
                "id": new_id(),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
    return message


class CallDeltas:
    """The deltas of one streamed answer that may make calls."""

    def __init__(self) -> None:
        self._reader = tool_calls.CallReader()

    @property
    def called(self) -> bool:
        """Whether a call was made."""
        return bool(self._reader.calls)

    def read(self, piece: str, *, last: bool) -> list[dict[str, Any]]:
        """What is sent for these characters, the last ones or not."""
        events = self._reader.read(piece)
        if last:
            events += self._reader.end()
        return [_delta(event) for event in events]


def new_id() -> str:
    """An id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _delta(event: tool_calls.Event) -> dict[str, Any]:
    if isinstance(event, Began):
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.index, "id": new_id(), "type": "function", "function": function}
        return {"tool_calls": [call]}
    if isinstance(event, Continued):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}
    return {"content": event}


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content)


def check_arguments(messages: Sequence[Any]) -> None:
    """Calls in a history hold JSON objects.

    Raises:
        RefusedError: naming the message.
    """
    for number, message in enumerate(messages):
        for call in message.tool_calls or ():
            try:
                found = json.loads(call.function.arguments or "{}")
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise RefusedError(
                    400,
                    f"message {number} calls {call.function.name} with arguments "
                    f"{call.function.arguments!r:.80}, expected a JSON object",
                    param=f"messages.{number}.tool_calls",
                )
