"""Formats answers as OpenAI's chat completions, complete or as chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from smolstack.generation.answer import Answer, TokenLogprob
from smolstack.generation.request import Update
from smolstack.processor.tokenizer import TextTokenizer
from smolstack.serve.error_responses import RefusedError

REASONS = {"stop": "stop", "length": "length", "repetition": "length"}
LEAST = -9999.0  # JSON has no minus infinity; this is OpenAI's number for "very unlikely"
DONE = "data: [DONE]\n\n"


class ChatCompletionWriter:
    """Formats the answers to one request as chat completions.

    Args:
        model: the model name in the request.
        tokenizer: decodes the tokens of log-probabilities.
        with_usage: whether the stream ends with a usage chunk.
    """

    def __init__(self, model: str, tokenizer: TextTokenizer, *, with_usage: bool = False) -> None:
        self.tokenizer, self.with_usage = tokenizer, with_usage
        self.frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return a ``chat.completion`` object."""
        return {
            **self.frame,
            "object": "chat.completion",
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": usage(answers),
            "timings": timings(answers[0]),
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": self._message(answer),
            "finish_reason": self._reason(answer),
            "logprobs": None if answer.logprobs is None else self._logprobs(answer.logprobs),
        }
        return {**choice, **probabilities(answer)}

    def _message(self, answer: Answer) -> dict[str, Any]:
        return {"role": "assistant", "content": answer.text, "refusal": None}

    def _reason(self, answer: Answer) -> str:
        return REASONS[answer.finish_reason]

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the first chunk, which contains the role."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(
        self, index: int, piece: str, logprobs: Sequence[TokenLogprob] = ()
    ) -> list[dict[str, Any]]:
        """Return the chunks for a piece of an answer."""
        return [self._chunk(index, {"content": piece}, logprobs)]

    def last_chunks(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """Return the chunks at the end of an answer, with its finish reason."""
        made = self._chunk(index, {})
        made["choices"][0] |= {
            "finish_reason": self._reason(answer),
            **probabilities(answer),
        }
        return [made]

    def begin(self, count: int) -> str:
        """Return the first event of each answer."""
        return "".join(event(self.first_chunk(index)) for index in range(count))

    def update(self, index: int, update: Update) -> str:
        """Return the events for an update of one answer."""
        made = []
        if update.piece or update.logprobs:
            made += self.chunks(index, update.piece, update.logprobs)
        if update.answer is not None:
            made += self.last_chunks(index, update.answer)
        return "".join(map(event, made))

    def end(self, answers: Sequence[Answer]) -> str:
        """Return the events at the end of the stream."""
        used = event(self.usage_chunk(answers)) if self.with_usage else ""
        return used + DONE

    def failed(self, refusal: RefusedError) -> str:
        """Return the event for an error within a stream."""
        return event(refusal.body())

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the usage chunk."""
        return {
            **self.frame,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage(answers),
            "timings": timings(answers[0]),
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": None,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
        }
        return {**self.frame, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": token_logprobs(logprobs, self.tokenizer), "refusal": None}


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def token_logprobs(
    logprobs: Sequence[TokenLogprob], tokenizer: TextTokenizer
) -> list[dict[str, Any]]:
    """Return log-probabilities in the format of chat completions."""

    texts: dict[int, tuple[str, list[int] | None]] = {}

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        if token_id not in texts:
            text = tokenizer.decode([token_id], skip_special=False)
            # A token that is part of a character has no text.
            texts[token_id] = text, None if "\ufffd" in text else list(text.encode())
        text, known = texts[token_id]
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": known}

    return [
        {
            **token(one.token_id, one.logprob),
            "top_logprobs": [token(token_id, value) for token_id, value in one.top],
        }
        for one in logprobs
    ]


def usage(answers: Sequence[Answer], each: int | None = None) -> dict[str, Any]:
    """Return the token usage of all answers; ``each``: answers per prompt, default all."""
    prompts = [answer.usage for answer in answers[:: each or len(answers)]]
    asked = sum(prompt.prompt_tokens for prompt in prompts)
    visual = sum(prompt.visual_tokens for prompt in prompts)
    said = sum(answer.usage.completion_tokens for answer in answers)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {
            "cached_tokens": sum(prompt.cached_tokens for prompt in prompts),
            "visual_tokens": visual,
            "image_tokens": visual,  # the name in vLLM and OpenAI's newer API
            "tiles": sum(prompt.tiles for prompt in prompts),
        },
    }


def timings(answer: Answer) -> dict[str, Any]:
    """Return seconds per stage; steps shared with other requests are counted in full."""
    took = answer.timings
    return {
        "images": round(took.images, 4),
        "vision": round(took.vision, 4),
        "prefill": round(took.prefill, 4),
        "decode": round(took.decode, 4),
        "tokens_per_second": round(took.tokens_per_second, 1),
    }


def probabilities(answer: Answer) -> dict[str, Any]:
    """Return the probability of each choice, for answers with ``choices``."""
    if answer.probabilities is None:
        return {}
    return {"probabilities": dict(answer.probabilities)}
