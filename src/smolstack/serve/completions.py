"""Answers in the shape of OpenAI's chat completions, whole or as chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from smolstack.generation.answer import Answer, TokenLogprob
from smolstack.processor.tokenizer import TextTokenizer

_REASONS = {"stop": "stop", "length": "length", "repetition": "length"}


class Completion:
    """The frame that all objects of one response share.

    Args:
        model: what the client called it.
        tokenizer: writes tokens as text, for logprobs.
    """

    def __init__(self, model: str, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A chat.completion."""
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
        return {**choice, **_probabilities(answer)}

    def _message(self, answer: Answer) -> dict[str, Any]:
        return {"role": "assistant", "content": answer.text, "refusal": None}

    def _reason(self, answer: Answer) -> str:
        return _REASONS[answer.finish_reason]

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The chunk that names the role."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(
        self, index: int, piece: str, logprobs: Sequence[TokenLogprob] = ()
    ) -> list[dict[str, Any]]:
        """Of a piece of an answer."""
        return [self._chunk(index, {"content": piece}, logprobs)]

    def last_chunks(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """The last one says why an answer ended."""
        made = self._chunk(index, {})
        made["choices"][0] |= {
            "finish_reason": self._reason(answer),
            **_probabilities(answer),
        }
        return [made]

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk that follows the last one, where the client asked for it."""
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
        return {
            "content": [
                {
                    **self._token(one.token_id, one.logprob),
                    "top_logprobs": [self._token(token, value) for token, value in one.top],
                }
                for one in logprobs
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id], skip_special=False)
        # Part of a character has no text of its own.
        known = None if "\ufffd" in text else list(text.encode())
        # JSON has no minus infinity; this is OpenAI's number for "very unlikely".
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": known}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens of all answers to one prompt."""
    prompt = answers[0].usage
    said = sum(answer.usage.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "completion_tokens": said,
        "total_tokens": prompt.prompt_tokens + said,
        "prompt_tokens_details": {
            "cached_tokens": prompt.cached_tokens,
            "visual_tokens": prompt.visual_tokens,
            "image_tokens": prompt.visual_tokens,  # as vLLM and OpenAI's newer API name them
            "tiles": prompt.tiles,
        },
    }


def timings(answer: Answer) -> dict[str, Any]:
    """Seconds of work, shared steps counted in full."""
    took = answer.timings
    return {
        "images": round(took.images, 4),
        "vision": round(took.vision, 4),
        "prefill": round(took.prefill, 4),
        "decode": round(took.decode, 4),
        "tokens_per_second": round(took.tokens_per_second, 1),
    }


def _probabilities(answer: Answer) -> dict[str, Any]:
    if answer.probabilities is None:
        return {}
    return {"probabilities": dict(answer.probabilities)}
