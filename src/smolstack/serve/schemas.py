"""The bodies of requests, as OpenAI defines them, with smolstack's options beside."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(max_length=2_000_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Body(BaseModel):
    # Clients send fields that say nothing to this server (user, metadata, store …).
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ImageURL(_Body):
    """A picture: a data URL, or the address of one where that is allowed."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Body):
    type: Literal["text"]
    text: _Text


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[Part], Field(min_length=1, max_length=1000)]


class StreamOptions(_Body):
    include_usage: bool = False


class JsonSchema(_Body):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), populate_by_name=True)
    name: str = "answer"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Body):
    """A chat completion. The last block holds what OpenAI's API does not have."""

    model: str = ""
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None

    top_k: int | None = Field(default=None, ge=0, le=10**6)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    stop_on_repetition: bool = False
    keep_special_tokens: bool = False
    regex: str | None = Field(default=None, max_length=2000)
    choices: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(
        default=None, min_length=1, max_length=100
    )
    split: bool | None = None
    max_image_tokens: int | None = Field(default=None, ge=1)
    upscale: bool = True
    deadline: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class PlanRequest(_Body):
    """A picture, or its size, whose tiles and tokens are asked for."""

    image_url: ImageURL | None = None
    width: int | None = Field(default=None, ge=1, le=10**6)
    height: int | None = Field(default=None, ge=1, le=10**6)
    text: _Text = ""
    split: bool | None = None
    max_image_tokens: int | None = Field(default=None, ge=1)
    upscale: bool = True
