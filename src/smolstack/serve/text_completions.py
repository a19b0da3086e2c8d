"""OpenAI's completions: continues prompts without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response

from smolstack.generation.answer import Answer, TokenLogprob
from smolstack.generation.options import ValidatedOptions
from smolstack.generation.request import Update
from smolstack.processor.processor import Prompt
from smolstack.processor.tokenizer import TextTokenizer
from smolstack.serve import request_options, request_reader
from smolstack.serve.chat_completions import DONE, LEAST, REASONS, event, probabilities, usage
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.media import Media
from smolstack.serve.request_handler import RequestHandler
from smolstack.serve.schemas import ChatRequest
from smolstack.serve.settings import ServerSettings
from smolstack.serve.text_completion_requests import CompletionRequest
from smolstack.vlm import VLM


def add_route(
    app: FastAPI,
    vlm: VLM,
    settings: ServerSettings,
    handler: RequestHandler,
    errors: Mapping[str, Any],
) -> None:
    """Add ``/v1/completions``."""
    tokenizer = vlm.processor.tokenizer

    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, with one response or with server-sent events."""
        asked, prompts = body.options(), body.prompts

        def make_prompts(
            vlm: VLM, asked: ChatRequest, _: list[Media], settings: ServerSettings
        ) -> tuple[list[Prompt], list[ValidatedOptions]]:
            each = request_options.answer_options(vlm, asked, settings, len(prompts))
            each = [replace(options, continues=True) for options in each]
            read = [_read(vlm, prompt, settings, body.add_special_tokens) for prompt in prompts]
            return [prompt for prompt in read for _ in each], each * len(read)

        def writer() -> TextCompletionWriter:
            echoed = [
                prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special=False)
                for prompt in prompts
            ]
            stream = body.stream_options
            return TextCompletionWriter(
                body.model or settings.name,
                tokenizer,
                echoed=echoed if body.echo else [""] * len(prompts),
                each=body.n or 1,
                keep_special=body.keep_special_tokens,
                with_usage=stream is not None and stream.include_usage,
            )

        characters = sum(map(len, prompts))  # or token ids, which are decoded
        return await handler.answer(
            asked, request, writer, make_prompts=make_prompts, characters=characters
        )

    app.post("/v1/completions", response_model=None, **errors)(completions)


def _read(vlm: VLM, prompt: str | list[int], settings: ServerSettings, special: bool) -> Prompt:
    """Return a prompt without a chat template; the text of special tokens is converted to them.

    Raises:
        RefusedError, ContextLengthError: the prompt is invalid or too long.
    """
    processor = vlm.processor
    tokenizer = processor.tokenizer
    if isinstance(prompt, str):
        request_reader.check_length(vlm, "the prompt has", len(prompt), settings)
        text, ids = prompt, tokenizer.encode(prompt, special=special)
    else:
        size = min(tokenizer.size, vlm.config.text.vocab_size)
        if wrong := [token for token in prompt if token >= size]:
            raise RefusedError(
                400,
                f"token id {wrong[0]} is not in the vocabulary of {size} tokens",
                param="prompt",
            )
        text, ids = tokenizer.decode(prompt, skip_special=False), prompt
    if vlm.config.image_token_id in ids:
        raise RefusedError(
            400,
            f"the prompt contains {processor.markers.image}, the placeholder of images; send "
            "images to /v1/chat/completions or /v1/responses",
            param="prompt",
        )
    if not ids:
        raise RefusedError(400, "the prompt has no tokens, expected at least one", param="prompt")
    made = Prompt(text, tuple(ids), (), ())
    request_reader.check_tokens(made, settings)
    return made


class TextCompletionWriter:
    """Formats answers as OpenAI's completions, complete or as events.

    Args:
        model: the model name in the request.
        tokenizer: decodes the tokens of log-probabilities.
        echoed: text to return before the answers to each prompt.
        each: number of consecutive answers to each prompt.
        keep_special: whether special tokens are part of an answer's text.
        with_usage: whether the stream ends with a usage event.
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
        self._offsets: dict[int, int] = {}  # offset of each answer's next token in its text
        self._incomplete: dict[int, list[int]] = {}  # tokens of an incomplete character
        self.frame = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return a ``text_completion`` object."""
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
        """Return the events with echoed prompts."""
        echoed = [(index, self.echoed[index // self.each]) for index in range(count)]
        return "".join(self._event(index, text) for index, text in echoed if text)

    def update(self, index: int, update: Update) -> str:
        """Return the events for an update of one answer."""
        made = ""
        if update.piece or update.logprobs:
            made += self._event(index, update.piece, logprobs=update.logprobs or None)
        if update.answer is not None:
            reason = REASONS[update.answer.finish_reason]
            made += self._event(index, "", reason, **probabilities(update.answer))
        return made

    def end(self, answers: Sequence[Answer]) -> str:
        """Return the events at the end of the stream."""
        used = {**self.frame, "choices": [], "usage": usage(answers, self.each)}
        return (event(used) if self.with_usage else "") + DONE

    def failed(self, refusal: RefusedError) -> str:
        """Return the event for an error within a stream."""
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
        """Return the tokens, their log-probabilities, those of the most likely tokens and the
        chosen one, and each token's offset in the answer's text."""
        return {
            "tokens": [self._token_text(one.token_id) for one in logprobs],
            "token_logprobs": [max(one.logprob, LEAST) for one in logprobs],
            "top_logprobs": [
                {
                    self._token_text(token): max(value, LEAST)
                    for token, value in (*one.top, (one.token_id, one.logprob))
                }
                for one in logprobs
            ],
            "text_offset": [self._offset(index, one.token_id) for one in logprobs],
        }

    def _token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)

    def _offset(self, index: int, token: int) -> int:
        """Return the text offset of the answer's next token."""
        place, half = self._offsets.get(index, 0), self._incomplete.setdefault(index, [])
        half.append(token)
        text = self.tokenizer.decode(half, skip_special=not self.keep_special)
        if "\ufffd" not in text:
            self._offsets[index] = place + len(text)
            half.clear()
        return place
