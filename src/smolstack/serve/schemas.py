"""Request bodies as defined by OpenAI, with smolstack's additional options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from smolstack.serve import strict_json
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.request_fields import normalize_fields, sent_names, without_nulls

Text = Annotated[str, Field(max_length=2_000_000)]
ModelName = Annotated[str, Field(max_length=500)]  # every event of a stream repeats it
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
# For items of lists and objects: by default, pydantic accepts true as 1.
_Number = Annotated[float, Field(strict=True)]
Integer = Annotated[int, Field(strict=True)]
_Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Body(BaseModel):
    # Unknown fields are errors; normalize_fields has removed those without effect.
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class _Numbers(Body):
    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = str(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and re.search(r"\b(int|float)\b", wanted):
            raise ValueError(f"found {str(value).lower()}, expected a number")
        return value


class ImageURL(Body):
    """An image: a data URL or, if the server allows it, an address."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(Body):
    """A video: a data URL or, if the server allows it, an address."""

    url: str


class VideoPart(Body):
    type: Literal["video_url"]
    video_url: VideoURL


class FileData(Body):
    """A PDF file, as in OpenAI's API: a data URL. Each page is an image."""

    file_data: str
    filename: str = ""


class FilePart(Body):
    type: Literal["file"]
    file: FileData


Part = Annotated[TextPart | ImagePart | VideoPart | FilePart, Field(discriminator="type")]


class CalledFunction(Body):
    name: Name
    arguments: Text = "{}"

    @field_validator("arguments")
    @classmethod
    def _json(cls, text: str) -> str:
        try:
            strict_json.read_text(text or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of a call are not valid JSON: {error}") from None
        return text


class ToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=1000)]
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=100)
    tool_call_id: str | None = None
    # Where the content is in a body that names it differently (/v1/responses).
    _place: str | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _role_fits(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls in a message of role {self.role}, expected assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id in a message of role {self.role}, expected tool")
        return self

    def place(self, number: int) -> str:
        """Return the path of the content in the request's body; ``number``: of this message."""
        return self._place or f"messages.{number}.content"

    def placed(self, place: str) -> ChatMessage:
        """Set the path of the content in the request's body."""
        self._place = place
        return self


class Function(Body):
    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class JsonSchema(Body):
    name: str = "answer"
    description: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _one_schema(self) -> ResponseFormat:
        if self.json_schema is not None and self.type != "json_schema":
            raise ValueError(f"found json_schema with the type {self.type}, expected json_schema")
        if self.schema_ is not None and self.type == "text":
            raise ValueError("found schema with the type text, expected json_schema")
        if self.schema_ is not None and self.json_schema is not None:
            raise ValueError("found schema and json_schema, expected only one of them")
        return self


class AnswerFields(_Numbers):
    """The options of an answer, common to all routes. The last block contains options that
    OpenAI's API does not have.

    Other servers' names of these options, fields that do not affect the answer, and unsupported
    fields with default values are accepted as well (listed in docs/serving.md).
    """

    model: ModelName = ""
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    json_schema: dict[str, Any] | bool | None = None
    top_k: int | None = Field(default=None, ge=0, le=10**6)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[_Number, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024
    )
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[Integer] | None = Field(default=None, max_length=128)
    bad_words: list[_Stop] | None = Field(default=None, max_length=128)
    stop_on_repetition: bool = False
    keep_special_tokens: bool = False
    regex: str | None = Field(default=None, max_length=2000)
    grammar: str | None = Field(default=None, max_length=20_000)
    choices: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(
        default=None, min_length=1, max_length=100
    )
    deadline: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    # The path in the body of each field that the body names differently.
    _sent_names: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _with_sent_names(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(data)
        if isinstance(data, Mapping):
            made._sent_names = sent_names(data)
        return made

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, data: Any) -> Any:
        return normalize_fields(data)

    def sent_name(self, field: str) -> str:
        """Return the path of a field in the request's body, which may name it differently."""
        return self._sent_names.get(field, field)

    def sent_as(self, names: Mapping[str, str]) -> Self:
        """Set the paths of fields that the request's body names differently."""
        self._sent_names = dict(names)
        return self

    @model_validator(mode="after")
    def _streams(self) -> AnswerFields:
        given = self.stream_options is not None and self.stream_options.model_fields_set
        if given and not self.stream:
            raise RefusedError(
                400, "stream_options is only allowed with stream: true", param="stream_options"
            )
        return self

    def shared(self) -> dict[str, Any]:
        """Return the values of the fields that all routes have."""
        return {name: getattr(self, name) for name in AnswerFields.model_fields}


class ImageFields(Body):
    """How images are split into tiles."""

    split: bool | None = None
    max_image_tokens: int | None = Field(default=None, ge=1)
    upscale: bool = True


class ChatRequest(AnswerFields, ImageFields):
    """A chat completion."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def texts(self) -> list[tuple[str, str]]:
        """Return the texts of the messages, each with its path in the body."""
        found = []
        for number, message in enumerate(self.messages):
            place, content = message.place(number), message.content
            if isinstance(content, str):
                found.append((place, content))
                continue
            parts = enumerate(content)
            found += [(f"{place}.{i}", p.text) for i, p in parts if isinstance(p, TextPart)]
        return found

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RefusedError(
                400,
                f"max_tokens is {both[0]} and max_completion_tokens is {both[1]}, expected only "
                "one of them",
                param="max_tokens",
            )
        return self

    def media_parts(self) -> list[tuple[str, ImagePart | VideoPart | FilePart]]:
        """Return the parts other than text, each with its path in the body."""
        return [
            (f"{message.place(number)}.{index}", part)
            for number, message in enumerate(self.messages)
            if not isinstance(message.content, str)
            for index, part in enumerate(message.content)
            if not isinstance(part, TextPart)
        ]


class PlanRequest(_Numbers, ImageFields):
    """An image, a page, a video or a size whose tiles and tokens are to be planned.

    ``preview`` requests the image as the processor reads it: the page, or the video's frames.
    """

    image_url: ImageURL | None = None
    video_url: VideoURL | None = None
    preview: bool = False
    width: int | None = Field(default=None, ge=1, le=10**6)
    height: int | None = Field(default=None, ge=1, le=10**6)
    text: Text = ""

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, data: Any) -> Any:
        found = without_nulls(data)
        for name in ("image_url", "video_url"):
            if isinstance(found, dict) and isinstance(found.get(name), str):
                found[name] = {"url": found[name]}
        return found
