"""Requests of OpenAI's responses API, and their conversion to chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from smolstack.serve.error_responses import RefusedError
from smolstack.serve.request_fields import normalize_fields
from smolstack.serve.schemas import (
    AnswerFields,
    Body,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    FileData,
    FilePart,
    Function,
    ImageFields,
    ImagePart,
    ImageURL,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Text,
    TextPart,
    Tool,
    ToolCall,
)

_OWN = frozenset({"metadata", "store", "user"})
_LOGPROBS = "message.output_text.logprobs"
# Unsupported fields → values that have no effect, and the error for any other value.
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "background is not supported; leave it out, or use stream"),
    "truncation": (("disabled",), "truncation is not supported; shorten the input instead"),
    "previous_response_id": (
        (),
        "this server does not store responses; send the whole conversation as input",
    ),
    "conversation": (
        (),
        "this server does not store conversations; send the whole conversation as input",
    ),
    "prompt": ((), "this server does not store prompts; send instructions and input"),
    "max_tool_calls": (
        (),
        "max_tool_calls concerns tools that the server calls, which do not exist; leave it out",
    ),
    "max_tokens": ((), "max_tokens is named max_output_tokens in this route"),
    "max_completion_tokens": (
        (),
        "max_completion_tokens is named max_output_tokens in this route",
    ),
    "messages": ((), "messages are named input in this route"),
    "response_format": ((), "response_format is named text.format in this route"),
    "n": ((1,), "a response has one answer; send several requests"),
    "logprobs": ((False,), f"to get logprobs, add {_LOGPROBS} to include"),
}
# Fields of earlier responses' items and parts that are not passed to the model.
_ITEM_HARMLESS = frozenset({"id", "status", "phase"})
_PART_HARMLESS = frozenset({"annotations", "logprobs", "cache_control"})


class InputText(Body):
    """Text of the user or, as ``output_text``, of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Text


class InputImage(Body):
    """An image: a data URL or, if the server allows it, an address."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] = "auto"


class InputFile(Body):
    """A PDF file, every page of which is an image: a data URL, or the address of one where that is
    allowed."""

    type: Literal["input_file"]
    file_data: str | None = None
    file_url: str | None = None
    filename: str = ""


InputPart = Annotated[InputText | InputImage | InputFile, Field(discriminator="type")]
_Content = Text | Annotated[list[InputPart], Field(min_length=1, max_length=1000)]


class MessageItem(Body):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class FunctionCallItem(CalledFunction):
    """A function call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str = ""


class FunctionCallOutputItem(Body):
    """The result of a function call."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Content


class ReasoningItem(Body):
    """Reasoning of an earlier answer, which is not passed to the model."""

    type: Literal["reasoning"]


Item = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem,
    Field(discriminator="type"),
]


class FunctionTool(Function):
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") != "function":
            raise ValueError(f"found the type {data.get('type')!r:.50}, expected function")
        return data

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = (parameters or {}).get("type", "object")
        if kind != "object":
            raise ValueError(f"found the type {kind!r:.50}, expected object")
        return parameters


class FunctionChoice(NamedFunction):
    type: Literal["function"]


class TextFormat(JsonSchema):
    """The format of an answer; ``json_schema`` has its schema in the same object."""

    type: Literal["text", "json_object", "json_schema"]

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("json_schema has no schema, expected one")
        return self


class TextSettings(Body):
    format: TextFormat | None = None


class ResponsesRequest(AnswerFields, ImageFields):
    """A response: text and images in, text or function calls out. Nothing is stored."""

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=1000)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextSettings | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        Field(default=None, max_length=16)
    )
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    user: str | None = None
    store: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, data: Any) -> Any:
        found = normalize_fields(data, _OWN)
        if not isinstance(found, dict):
            return found
        found.pop("reasoning", None)  # like reasoning_effort
        for name, (neutral, sentence) in _NEUTRAL.items():
            if name not in found:
                continue
            if found[name] not in (*neutral, "", [], {}) or found[name] is True:
                raise RefusedError(400, sentence, param=name)
            del found[name]
        if isinstance(text := found.get("text"), dict):
            found["text"] = {key: value for key, value in text.items() if key != "verbosity"}
        if isinstance(items := found.get("input"), list):
            found["input"] = [_item(item, f"input.{number}") for number, item in enumerate(items)]
        return found

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ())

    def chat(self) -> ChatRequest:
        """Convert the request to a chat and clear its input, whose images are large.

        Raises:
            RefusedError: a field has no effect without another one.
        """
        if self.top_logprobs and not self.wants_logprobs:
            raise RefusedError(
                400, f"top_logprobs needs {_LOGPROBS} in include", param="top_logprobs"
            )
        messages = _messages(self)
        if all(message.role == "system" for message in messages) and not any(
            isinstance(item, MessageItem) for item in self.input
        ):
            raise RefusedError(400, "input has only reasoning, expected a message", param="input")
        self.input = ""
        named = isinstance(self.tool_choice, FunctionChoice)
        made = ChatRequest.model_construct(
            **self.shared(),
            **{name: getattr(self, name) for name in ImageFields.model_fields},
            messages=messages,
            max_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs,
            top_logprobs=self.top_logprobs if self.wants_logprobs else None,
            response_format=_form(self.text),
            tools=[
                Tool(type="function", function=Function(**tool.model_dump(exclude={"type"})))
                for tool in self.tools or ()
            ],
            tool_choice=NamedTool(
                type="function",
                function=NamedFunction(name=self.tool_choice.name),  # type: ignore[union-attr]
            )
            if named
            else self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
        )
        return made.sent_as({**self._sent_names, "response_format": "text.format"})


def _item(item: Any, where: str) -> Any:
    """Return an item of the input without the fields that are not passed to the model."""
    if not isinstance(item, dict):
        return item
    found = {key: value for key, value in item.items() if key not in _ITEM_HARMLESS}
    kind = found.get("type", "message")
    if kind == "item_reference":
        raise RefusedError(
            400,
            f"{where} refers to a stored item, but this server does not store items",
            param=where,
        )
    if kind == "reasoning":  # an empty one keeps the numbers of the items after it
        return {"type": kind}
    found["type"] = kind
    for name in ("content", "output"):
        if isinstance(parts := found.get(name), list):
            found[name] = [_part(part, f"{where}.{name}.{n}") for n, part in enumerate(parts)]
    return found


def _part(part: Any, where: str) -> Any:
    if not isinstance(part, dict):
        return part
    send = {"input_image": "image_url", "input_file": "file_data"}.get(str(part.get("type")))
    if send and "file_id" in part:
        raise RefusedError(
            400, f"{where} has a file_id, but this server does not store files; send {send}",
            param=where,
        )  # fmt: skip
    if part.get("type") == "input_file" and ("file_data" in part) == ("file_url" in part):
        found = "both" if "file_data" in part else "none"
        raise RefusedError(
            400, f"{where}: found {found} of file_data and file_url, expected one of them",
            param=where,
        )  # fmt: skip
    return {key: value for key, value in part.items() if key not in _PART_HARMLESS}


def _messages(request: ResponsesRequest) -> list[ChatMessage]:
    """Return the input as chat messages."""
    found: list[ChatMessage] = []
    if request.instructions:
        made = ChatMessage(role="system", content=request.instructions)
        found.append(made.placed("instructions"))
    if isinstance(request.input, str):
        return [*found, ChatMessage(role="user", content=request.input).placed("input")]
    for number, item in enumerate(request.input):
        if isinstance(item, ReasoningItem):
            continue
        where = f"input.{number}"
        if isinstance(item, MessageItem):
            made = ChatMessage(role=item.role, content=_content(item.content))
            found.append(made.placed(f"{where}.content"))
        elif isinstance(item, FunctionCallOutputItem):
            told = _content(item.output)
            made = ChatMessage(role="tool", content=told, tool_call_id=item.call_id)
            found.append(made.placed(f"{where}.output"))
        else:
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = ToolCall(id=item.call_id, function=function)
            if not found or found[-1].role != "assistant":
                found.append(ChatMessage(role="assistant", content=""))
            found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
    return found


def _content(content: str | list[InputText | InputImage | InputFile]) -> str | list[Any]:
    return content if isinstance(content, str) else [_chat_part(part) for part in content]


def _chat_part(part: InputText | InputImage | InputFile) -> TextPart | ImagePart | FilePart:
    if isinstance(part, InputText):
        return TextPart(type="text", text=part.text)
    if isinstance(part, InputFile):
        data = FileData(file_data=part.file_data or part.file_url or "", filename=part.filename)
        return FilePart(type="file", file=data)
    return ImagePart(type="image_url", image_url=ImageURL(url=part.image_url, detail=part.detail))


def _form(text: TextSettings | None) -> ResponseFormat | None:
    form = None if text is None else text.format
    if form is None:
        return None
    schema = None
    if form.type == "json_schema":
        schema = JsonSchema.model_validate(form.model_dump(by_alias=True, exclude={"type"}))
    return ResponseFormat(type=form.type, json_schema=schema)
