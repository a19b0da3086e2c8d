"""Requests of OpenAI's completions API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from smolstack.serve.error_responses import RefusedError
from smolstack.serve.request_fields import normalize_fields
from smolstack.serve.schemas import AnswerFields, ChatRequest, ResponseFormat, Text

_MAX_TOKENS = 16  # OpenAI's default
_OWN = frozenset({"echo", "add_special_tokens", "best_of"})
_ELSEWHERE = {
    "messages": "messages belong to /v1/chat/completions; send prompt",
    "suffix": "suffix is not supported: the model cannot take into account text after the answer; "
    "leave it out",
}


def _kind(prompt: Any) -> str | None:
    """Return which of the four forms a prompt has, determined by its first element."""
    kinds = {str: "texts", int: "tokens", list: "lists of tokens"}
    if isinstance(prompt, list) and prompt:
        return kinds.get(type(prompt[0]))
    return "text" if isinstance(prompt, str) else None


_One = Annotated[Text, Field(min_length=1)]
_Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], Field(min_length=1, max_length=1_000_000)]
_Prompt = Annotated[
    Annotated[_One, Tag("text")]
    | Annotated[list[_One], Field(max_length=1000), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], Field(max_length=1000), Tag("lists of tokens")],
    Discriminator(
        _kind,
        custom_error_type="prompt",
        custom_error_message="expected a text, a list of texts, a list of token ids, or a list of "
        "such lists",
    ),
]


class CompletionRequest(AnswerFields):
    """A text completion: one or more prompts, used without a chat template."""

    prompt: _Prompt
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = Field(default=None, ge=1)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, data: Any) -> Any:
        found = normalize_fields(data, _OWN)
        if isinstance(found, dict):
            for name, sentence in _ELSEWHERE.items():
                if name in found and found[name] != "":
                    raise RefusedError(400, sentence, param=name)
                found.pop(name, None)
        return found

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def options(self) -> ChatRequest:
        """Return the options of the answers as a chat request without messages.

        Raises:
            RefusedError: two fields cannot be combined.
        """
        if self.best_of not in (None, self.n or 1):
            raise RefusedError(
                400,
                f"best_of is {self.best_of} and n is {self.n or 1}; selecting the best answers is "
                "not supported, expected equal numbers",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise RefusedError(
                400,
                "found echo and logprobs, which cannot be combined: log-probabilities of the "
                "prompt are not computed",
                param="echo",
            )
        made = ChatRequest.model_construct(
            **self.shared(),
            messages=[],
            n=self.n,
            max_tokens=self.max_tokens or _MAX_TOKENS,
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs,
            response_format=self.response_format,
        )
        return made.sent_as(self._sent_names)
