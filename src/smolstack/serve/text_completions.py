"""OpenAI's completions: texts, or their tokens, that are continued as they are."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response

from smolstack.generation.answer import Answer, TokenLogprob
from smolstack.generation.options import ReadOptions
from smolstack.generation.request import Update
from smolstack.processor.processor import Prompt
from smolstack.processor.tokenizer import TextTokenizer
from smolstack.serve import request_reader
from smolstack.serve.answering import Answering
from smolstack.serve.completion_requests import CompletionRequest
from smolstack.serve.completions import DONE, LEAST, REASONS, event, probabilities, usage
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.media import Media
from smolstack.serve.schemas import ChatRequest
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM


def add_route(
    app: FastAPI,
    vlm: VLM,
    settings: ServerSettings,
    answering: Answering,
    errors: Mapping[str, Any],
) -> None:
    """Add ``/v1/completions``."""
    tokenizer = vlm.processor.tokenizer

    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, whole or as server-sent events."""
        asked, prompts = body.options(), body.prompts

        def prepare(
            vlm: VLM, asked: ChatRequest, _: list[Media], settings: ServerSettings
        ) -> tuple[list[Prompt], list[ReadOptions]]:
            each = request_reader.answer_options(vlm, asked, settings, len(prompts))
            each = [replace(options, continues=True) for options in each]
            read = [_read(vlm, prompt, settings, body.add_special_tokens) for prompt in prompts]
            return [prompt for prompt in read for _ in each], each * len(read)

        def writer() -> TextCompletion:
            echoed = [
                prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special=False)
                for prompt in prompts
            ]
            stream = body.stream_options
            return TextCompletion(
                body.model or settings.name,
                tokenizer,
                echoed=echoed if body.echo else [""] * len(prompts),
                each=body.n or 1,
                keep_special=body.keep_special_tokens,
                with_usage=stream is not None and stream.include_usage,
            )

        characters = sum(map(len, prompts))  # or tokens, which are decoded
        return await answering.answer(
            asked, request, writer, prepare=prepare, characters=characters
        )

    app.post("/v1/completions", response_model=None, **errors)(completions)


def _read(vlm: VLM, prompt: str | list[int], settings: ServerSettings, special: bool) -> Prompt:
    """A prompt that is taken as it is: control tokens that it spells are those tokens.

    Raises:
        RefusedError, ContextLengthError: it is none of this model's.
    """
    processor = vlm.processor
    tokenizer = processor.tokenizer
    if isinstance(prompt, str):
        request_reader.check_length(vlm, "the prompt holds", len(prompt), settings)
        text, ids = prompt, tokenizer.encode(prompt, special=special)
    else:
        size = min(tokenizer.size, vlm.config.text.vocab_size)
        if wrong := [token for token in prompt if token >= size]:
            raise RefusedError(
                400, f"token {wrong[0]} is none of the {size} of the vocabulary", param="prompt"
            )
        text, ids = tokenizer.decode(prompt, skip_special=False), prompt
    if vlm.config.image_token_id in ids:
        raise RefusedError(
            400,
            f"the prompt holds {processor.markers.image}, which marks an image; images are asked "
            "about at /v1/chat/completions and /v1/responses",
            param="prompt",
        )
    if not ids:
        raise RefusedError(400, "the prompt has no tokens, expected some", param="prompt")
    made = Prompt(text, tuple(ids), (), ())
    request_reader.check_tokens(made, settings)
    return made


class TextCompletion:
    """Answers in the shape of OpenAI's completions, whole or as events.

    Args:
        model: what the client called it.
        tokenizer: writes tokens as text, for logprobs.
        echoed: what stands before the answers to each prompt.
        each: answers to each prompt, one after the other.
        keep_special: whether special tokens are part of an answer's text.
        with_usage: whether the last event of a stream says what was used.
    """

    def __init__(
        self,
        model: str,
        tokenizer: TextTokenizer,
        *,
        echoed: Sequence[str],
        each: int,
        keep_special: bool,
        with_usage: bool,
    ) -> None:
        self.tokenizer, self.echoed, self.each = tokenizer, echoed, each
        self.keep_special, self.with_usage = keep_special, with_usage
        self._places: dict[int, int] = {}  # of each answer's next token in its text
        self._half: dict[int, list[int]] = {}  # tokens that are no whole character yet
        self.frame = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A text_completion."""
        choices = [
            self._choice(
                index,
                self.echoed[index // self.each] + answer.text,
                REASONS[answer.finish_reason],
                answer.logprobs,
            )
            | probabilities(answer)
            for index, answer in enumerate(answers)
        ]
        return {**self.frame, "choices": choices, "usage": usage(answers, self.each)}

    def begin(self, count: int) -> str:
        """The events with what is echoed."""
        echoed = [(index, self.echoed[index // self.each]) for index in range(count)]
        return "".join(self._event(index, text) for index, text in echoed if text)

    def update(self, index: int, update: Update) -> str:
        """The events of what is new about one answer."""
        made = ""
        if update.piece or update.logprobs:
            made += self._event(index, update.piece, logprobs=update.logprobs or None)
        if update.answer is not None:
            reason = REASONS[update.answer.finish_reason]
            made += self._event(index, "", reason, **probabilities(update.answer))
        return made

    def end(self, answers: Sequence[Answer]) -> str:
        """The events after the last word."""
        used = {**self.frame, "choices": [], "usage": usage(answers, self.each)}
        return (event(used) if self.with_usage else "") + DONE

    def failed(self, refusal: RefusedError) -> str:
        """The event of an error in the midst of a stream."""
        return event(refusal.body())

    def _event(
        self,
        index: int,
        text: str,
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
        **more: Any,
    ) -> str:
        choice = self._choice(index, text, reason, logprobs)
        return event({**self.frame, "choices": [choice | more]})

    def _choice(
        self, index: int, text: str, reason: str | None, logprobs: Sequence[TokenLogprob] | None
    ) -> dict[str, Any]:
        told = None if logprobs is None else self._logprobs(index, logprobs)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Tokens, their log-probabilities, those of the likeliest ones and of the one that was
        taken, and where in the answer's text each begins."""
        return {
            "tokens": [self._written(one.token_id) for one in logprobs],
            "token_logprobs": [max(one.logprob, LEAST) for one in logprobs],
            "top_logprobs": [
                {
                    self._written(token): max(value, LEAST)
                    for token, value in (*one.top, (one.token_id, one.logprob))
                }
                for one in logprobs
            ],
            "text_offset": [self._place(index, one.token_id) for one in logprobs],
        }

    def _written(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)

    def _place(self, index: int, token: int) -> int:
        """Where a token begins: the next one of this answer."""
        place, half = self._places.get(index, 0), self._half.setdefault(index, [])
        half.append(token)
        text = self.tokenizer.decode(half, skip_special=not self.keep_special)
        if "\ufffd" not in text:
            self._places[index] = place + len(text)
            half.clear()
        return place
