"""Function calling where something ends, is switched off, is too long or has an older name."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from tests.serve.conftest import Process
from tests.serve.test_chat import MODEL, asking
from tests.serve.test_functions import TOOLS
from tests.serve.test_refusals import message, post

LINE = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def test_a_call_that_ends_within_its_mark_is_no_text(client: openai.OpenAI, number: str) -> None:
    asked: Any = {
        "model": MODEL, "messages": asking(number), "tools": TOOLS, "tool_choice": "required",
        "max_tokens": 5,
    }  # fmt: skip
    [whole] = client.chat.completions.create(**asked).choices
    assert whole.finish_reason == "length"
    assert whole.message.content is None
    assert whole.message.tool_calls is None
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_an_answer_that_may_call_nothing_has_no_calls(client: openai.OpenAI, number: str) -> None:
    asked: Any = {
        "model": MODEL, "messages": asking(number), "tools": TOOLS, "tool_choice": "none",
        "extra_body": {"choices": [LINE]},
    }  # fmt: skip
    [whole] = client.chat.completions.create(**asked).choices
    assert whole.message.content == LINE
    assert whole.message.tool_calls is None
    assert whole.finish_reason == "stop"


TOLD: Any = {"type": "function", "function": {"name": "now", "description": "word " * 400_000}}
CALLED: Any = {"type": "function", "function": {"name": "now", "arguments": f'"{"word " * 10**5}"'}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [TOLD]}, "have 2,000,0"),
        ({"messages": [{"role": "user", "content": "?"},
                       {"role": "assistant", "tool_calls": [CALLED]}]},
         "the messages and tools have 500,0"),
        ({"tools": TOOLS, "min_tokens": 1}, "found min_tokens and tools"),
        ({"tools": [{"type": "function", "function": {"name": "now", "parameters": {
            "properties": {"zone": {"type": "string", "pattern": "^(?!x).*$"}}}}}]},
         "arguments of now: properties.zone.pattern '^(?!x).*$': look-around"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "a", "arguments": "{}"}}]},
         "function_call in a message is the deprecated form of tool calling; send tool_calls"),
        ({"messages": [{"role": "function", "name": "a", "content": "1"}]},
         "the role function in a message is the deprecated form of tool calling; send the role "),
        ({"stop_token_ids": [True]}, "stop_token_ids.0: Input should be a valid integer"),
        ({"logit_bias": {"5": True}}, "logit_bias.5: Input should be a valid number"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_refusal_names_what_was_sent(
    server: Process, fields: dict[str, Any], expected: str
) -> None:
    asked = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1, **fields}
    response = post(server, asked)
    assert response.status_code == 400, response.text
    assert expected in message(response)
