"""Formats answers as OpenAI's responses, complete or as events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from smolstack.generation.answer import Answer
from smolstack.generation.request import Update
from smolstack.processor.tokenizer import TextTokenizer
from smolstack.serve.chat_completions import probabilities, timings, token_logprobs
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.response_requests import ResponsesRequest
from smolstack.serve.tool_calls import CallReader, is_truncated


class ResponseWriter:
    """Formats one response, whose items (a message or function calls) grow.

    Args:
        model: the model name in the request.
        tokenizer: decodes the tokens of log-probabilities.
        request: the request.
        calls: whether the answer may call functions.
    """

    def __init__(
        self, model: str, tokenizer: TextTokenizer, request: ResponsesRequest, *, calls: bool
    ) -> None:
        self.tokenizer = tokenizer
        self._reader = CallReader() if calls else None
        self._items: list[dict[str, Any]] = []
        self._open = False  # whether the last item is incomplete
        self._number = 0
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not been sent yet
        self.frame = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,  # also if true was requested: nothing is stored
            "temperature": request.temperature or 0.0,
            "text": _text_settings(request),
            "tool_choice": _choice(request),
            "tools": [_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "user": request.user,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return a ``response`` object."""
        [answer] = answers
        self.update(0, Update(answer.text, answer.logprobs or (), answer))
        return self._response(answer)

    def begin(self, _: int) -> str:
        """Return the events at the start of the stream."""
        made = {**self.frame, "status": "in_progress", "output": [], "usage": None}
        return self._event("response.created", response=made) + self._event(
            "response.in_progress", response=made
        )

    def update(self, _: int, update: Update) -> str:
        """Return the events for an update of the answer."""
        self._logprobs += token_logprobs(update.logprobs, self.tokenizer)
        made = ""
        for delta in self._deltas(update):
            for part in delta.get("tool_calls", ()):
                made += self._call_part(part)
            if delta.get("content"):
                made += self._text(delta["content"])
        if update.answer is not None:
            cut = update.answer.finish_reason != "stop"
            if not self._items and not (self._reader and is_truncated(update.answer)):
                made += self._begin_message()  # an empty answer is a message as well
            made += self._close("incomplete" if cut else "completed")
        return made

    def end(self, answers: Sequence[Answer]) -> str:
        """Return the event at the end of the stream."""
        made = self._response(answers[0])
        return self._event(f"response.{made['status']}", response=made)

    def failed(self, refusal: RefusedError) -> str:
        """Return the event for an error within a stream."""
        error = {"code": "server_error", "message": refusal.message}
        made = {**self.frame, "status": "failed", "error": error, "output": [], "usage": None}
        return self._event("response.failed", response=made)

    def _deltas(self, update: Update) -> list[dict[str, Any]]:
        """Return the new content as deltas of chat completions."""
        if self._reader is None:
            return [{"content": update.piece}]
        deltas = self._reader.push(update.piece)
        if update.answer is not None and not is_truncated(update.answer):
            deltas += self._reader.finish()
        return deltas

    def _call_part(self, part: dict[str, Any]) -> str:
        """Return the events for the beginning or continuation of a call."""
        made, index = "", part["index"]
        if "id" in part:
            made += self._close("completed")
            call = {"call_id": part["id"], "name": part["function"]["name"], "arguments": ""}
            made += self._begin({"id": _name("fc"), "type": "function_call", **call})
        if piece := part["function"]["arguments"]:
            self._items[-1]["arguments"] += piece
            kind = "response.function_call_arguments.delta"
            made += self._event(kind, **self._position(), delta=piece)
        assert self._reader is not None
        call_read = self._reader.calls[index]
        if call_read.complete and self._items[-1]["arguments"] == call_read.arguments:
            made += self._close("completed")
        return made

    def _text(self, piece: str) -> str:
        made = "" if self._open else self._begin_message()
        part = self._items[-1]["content"][0]
        part["text"] += piece
        part["logprobs"] += self._logprobs
        made += self._event(
            "response.output_text.delta",
            **self._position(0),
            delta=piece,
            logprobs=self._logprobs,
        )
        self._logprobs = []
        return made

    def _begin_message(self) -> str:
        part: dict[str, Any] = {
            "type": "output_text", "text": "", "annotations": [], "logprobs": [],
        }  # fmt: skip
        made = self._begin(
            {"id": _name("msg"), "type": "message", "role": "assistant", "content": []}
        )
        made += self._event("response.content_part.added", **self._position(0), part=part)
        self._items[-1]["content"].append(part)
        return made

    def _begin(self, item: dict[str, Any]) -> str:
        item["status"] = "in_progress"
        self._items.append(item)
        self._open = True
        index = len(self._items) - 1
        return self._event("response.output_item.added", output_index=index, item=item)

    def _close(self, status: str) -> str:
        """Return the events at the end of an item, complete or not."""
        if not self._open:
            return ""
        self._open, item, made = False, self._items[-1], ""
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"] += self._logprobs
            made += self._event(
                "response.output_text.done",
                **self._position(0),
                text=part["text"],
                logprobs=part["logprobs"],
            )
            made += self._event("response.content_part.done", **self._position(0), part=part)
        elif status == "completed":
            made += self._event(
                "response.function_call_arguments.done",
                **self._position(),
                name=item["name"],
                arguments=item["arguments"],
            )
        index = len(self._items) - 1
        return made + self._event("response.output_item.done", output_index=index, item=item)

    def _response(self, answer: Answer) -> dict[str, Any]:
        cut, used = answer.finish_reason != "stop", answer.usage
        return {
            **self.frame,
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            # An incomplete call is left out: its arguments are not valid JSON.
            "output": [
                item
                for item in self._items
                if item["type"] == "message" or item["status"] == "completed"
            ],
            "usage": {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": used.cached_tokens,
                    "image_tokens": used.visual_tokens,
                },
                "output_tokens": used.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.prompt_tokens + used.completion_tokens,
            },
            "timings": timings(answer),
            **probabilities(answer),
        }

    def _position(self, content: int | None = None) -> dict[str, Any]:
        """Return the position of the last item in the response."""
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if content is None else {**place, "content_index": content}

    def _event(self, kind: str, **data: Any) -> str:
        told = {"type": kind, "sequence_number": self._number, **data}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(told, ensure_ascii=False)}\n\n"


def _name(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _text_settings(request: ResponsesRequest) -> dict[str, Any]:
    form = request.text and request.text.format
    if not form or form.type != "json_schema":
        return {"format": {"type": form.type if form else "text"}}
    return {"format": form.model_dump(by_alias=True)}


def _choice(request: ResponsesRequest) -> Any:
    choice = request.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _tool(tool: Any) -> dict[str, Any]:
    found: dict[str, Any] = tool.model_dump()
    return found
