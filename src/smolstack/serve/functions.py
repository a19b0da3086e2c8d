"""Tool calling: the grammar of calls, and the description of tools in the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smolstack.generation.grammar import guided
from smolstack.generation.lark import CALL_BEGIN, CALL_END, Lark, calls_grammar, written
from smolstack.processor.inputs import ImageOptions
from smolstack.processor.processor import Processor, Prompt
from smolstack.processor.prompt import split_messages
from smolstack.serve.error_responses import RefusedError

if TYPE_CHECKING:
    from smolstack.serve.schemas import ChatMessage, ChatRequest, Tool

_STRUCTURES = ("regex", "choices", "grammar")
_TOOL_PROMPT = (
    "You can call functions. They are described by these lines of JSON:\n{tools}\n"
    "To call one, answer with its name and its arguments in this form, and nothing else:\n"
    f'{CALL_BEGIN}{{{{"name": "the name", "arguments": {{{{}}}}}}}}{CALL_END}'
)


def uses_tools(request: ChatRequest) -> bool:
    """Whether a chat's prompt contains functions, calls or results."""
    return bool(offered_tools(request)) or any(
        message.tool_calls or message.role == "tool" for message in request.messages
    )


def offered_tools(request: ChatRequest) -> list[Tool]:
    """Return the functions that an answer may call; none if ``tool_choice`` is "none".

    Raises:
        RefusedError: ``tool_choice`` names no tool, or tools are combined with structured output.
    """
    choice, tools = request.tool_choice, request.tools or []
    wanted = None if choice is None or isinstance(choice, str) else choice.function.name
    names = [tool.function.name for tool in tools]
    if not tools:
        if wanted is not None or choice == "required":
            raise RefusedError(
                400, "tool_choice requires a call, but there are no tools", param="tool_choice"
            )
        return []
    if len(set(names)) < len(names):
        raise RefusedError(
            400, "two tools have the same name, expected different names", param="tools"
        )
    if wanted is not None and wanted not in names:
        raise RefusedError(
            400,
            f"tool_choice names {wanted!r}, but the functions are {', '.join(names)[:300]}",
            param="tool_choice",
        )
    if choice == "none":
        return []
    for name in _STRUCTURES:
        if getattr(request, name) is not None:
            sent = request.sent_name(name)
            raise RefusedError(400, f"found {sent} and tools, which cannot be combined", param=sent)
    if request.stop:
        raise RefusedError(
            400,
            "found stop and tools, which cannot be combined: stop would cut calls",
            param="stop",
        )
    return tools if wanted is None else [tool for tool in tools if tool.function.name == wanted]


def check_results(messages: Sequence[ChatMessage]) -> None:
    """Refuse results of calls that no earlier message made.

    Raises:
        RefusedError: naming the result's id.
    """
    calls: list[str] = []
    for number, message in enumerate(messages):
        calls += [call.id for call in message.tool_calls or ()]
        if message.tool_call_id is not None and message.tool_call_id not in calls:
            known = ", ".join(calls)[:200] or "none was made before it"
            content = message.place(number)
            place = f"{content.removesuffix('.content')}.tool_call_id"
            if content.endswith(".output"):  # of /v1/responses
                place = f"{content.removesuffix('.output')}.call_id"
            raise RefusedError(
                400,
                f"{place} is {message.tool_call_id[:100]!r}, expected the "
                f"id of an earlier call: {known}",
                param=place,
            )


def characters(request: ChatRequest) -> int:
    """Return the number of characters that functions and calls add to a prompt."""
    tools = sum(len(_description(tool)) for tool in offered_tools(request))
    return tools + sum(len(text) for text in _calls_as_text(request))


def answer_grammar(
    request: ChatRequest, text: Mapping[str, Any] | bool | None, close: Any
) -> Lark | None:
    """Return the grammar of an answer that may, or must, call functions; None without functions.

    Args:
        text: the schema of answers without calls.
        close: called with a schema and its ``strict`` flag; forbids additional properties.
    """
    tools = offered_tools(request)
    if not tools:
        return None
    schemas = {}
    for number, tool in enumerate(request.tools or []):
        if tool not in tools:
            continue
        found = tool.function.parameters or {"properties": {}}
        if found.get("type", "object") != "object":
            raise RefusedError(
                400,
                f"tools.{number}.function.parameters has the type {found['type']!r:.50}, "
                "expected object",
                param=f"tools.{number}.function.parameters",
            )
        schema = close({"type": "object", **found}, tool.function.strict)
        schemas[tool.function.name] = guided(schema)
    named = request.tool_choice is not None and not isinstance(request.tool_choice, str)
    several = request.parallel_tool_calls is not False and not named
    free = request.tool_choice in (None, "auto")
    shown = guided(text) if free and text is not None else None
    return calls_grammar(schemas, several=several, free=free, text=shown)


def prompt_with_tools(
    processor: Processor,
    request: ChatRequest,
    messages: list[dict[str, Any]],
    image_options: ImageOptions,
) -> Prompt:
    """Return the prompt of a chat with functions, calls or results.

    A chat template that supports tools receives them as variables. Otherwise they are written as
    text: tools in the system message, results in user messages.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in offered_tools(request)]
    told = "\n".join(map(_description, offered_tools(request)))
    for text in (told, *_calls_as_text(request)):
        if processor.markers.image in text:
            raise RefusedError(
                400,
                f"a tool or call contains {processor.markers.image}, the placeholder of images",
                param="tools",
            )
    template = processor.template
    if template is not None and template.knows_tools:
        # Replaced while images are extracted: the role "tool" is known to the template only.
        known = [{**each, "role": "user"} if each["role"] == "tool" else each for each in messages]
        plain, images = split_messages(known, processor.open_video)
        for made, each, asked in zip(plain, messages, request.messages, strict=True):
            made["role"] = each["role"]
            if asked.tool_calls:
                made["tool_calls"] = [_for_template(call) for call in asked.tool_calls]
            if asked.tool_call_id is not None:
                made["tool_call_id"] = asked.tool_call_id
        rendered = processor.render(plain, tools=tools or None)
        return processor.prepare_text(rendered, images, **image_options)
    plain = [_as_text(*pair) for pair in zip(messages, request.messages, strict=True)]
    if tools:
        text = _TOOL_PROMPT.format(tools=told)
        if plain[0]["role"] == "system":
            content = plain[0]["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            plain[0] = {
                "role": "system",
                "content": [*parts, {"type": "text", "text": f"\n\n{text}"}],
            }
        else:
            plain.insert(0, {"role": "system", "content": text})
    return processor.prepare(plain, **image_options)


def _description(tool: Tool) -> str:
    return json.dumps(tool.function.model_dump(exclude_none=True), ensure_ascii=False)


def _for_template(call: Any) -> dict[str, Any]:
    """Return a call with its arguments as an object, as chat templates expect."""
    made: dict[str, Any] = call.model_dump(exclude_none=True)
    made["function"]["arguments"] = json.loads(call.function.arguments or "{}")
    return made


def _calls_as_text(request: ChatRequest) -> Iterator[str]:
    for message in request.messages:
        yield _calls(message)


def _calls(message: ChatMessage) -> str:
    calls = message.tool_calls or []
    return written([(call.function.name, call.function.arguments or "{}") for call in calls])


def _as_text(plain: dict[str, Any], message: ChatMessage) -> dict[str, Any]:
    content = plain["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if message.role == "tool":
        before = {"type": "text", "text": "<tool_response>"}
        after = {"type": "text", "text": "</tool_response>"}
        return {"role": "user", "content": [before, *parts, after]}
    if message.tool_calls:
        return {
            "role": "assistant",
            "content": [*parts, {"type": "text", "text": _calls(message)}],
        }
    return plain
