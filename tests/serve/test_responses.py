"""OpenAI's responses API, by the openai client as it is installed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from tests.serve.conftest import Process
from tests.serve.test_chat import MODEL, QUESTION
from tests.serve.test_refusals import message, post

from smolstack.serve.request_fields import HARMLESS
from smolstack.serve.response_requests import ResponsesRequest

TOOL: Any = {
    "type": "function",
    "name": "note",
    "parameters": {
        "type": "object",
        "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["number"],
    },
    "strict": True,
}
MESSAGE_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def asked(number: str) -> list[Any]:
    text = {"type": "input_text", "text": QUESTION}
    image = {"type": "input_image", "image_url": number, "detail": "auto"}
    return [{"role": "user", "content": [image, text]}]


def chat_of(**fields: Any) -> Any:
    """The chat that a request amounts to, as plain data without what was left out."""
    chat = ResponsesRequest.model_validate(fields).chat()
    return chat.model_dump(exclude_none=True, by_alias=True)


def test_an_image_is_read(client: openai.OpenAI, number: str, says: str) -> None:
    made: Any = client.responses.create(
        model=MODEL, input=asked(number), store=True, metadata={"a": "b"}, user="me"
    )
    assert (made.output_text, made.status, made.object) == (says, "completed", "response")
    assert made.id.startswith("resp_")
    [item] = made.output
    assert (item.type, item.status) == ("message", "completed")
    assert made.metadata == {"a": "b"}
    assert made.store is False
    assert made.previous_response_id is None
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert made.usage.output_tokens_details.reasoning_tokens == 0
    again = client.responses.create(model=MODEL, input=asked(number))
    assert again.usage is not None
    assert 0 < again.usage.input_tokens_details.cached_tokens < again.usage.input_tokens


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI, number: str) -> None:
    made: Any = client.responses.create(model=MODEL, input=asked(number), max_output_tokens=2)
    assert (made.status, made.output[0].status) == ("incomplete", "incomplete")
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(
        model=MODEL, input=asked(number), max_output_tokens=2, stream=True
    )
    assert last.type == "response.incomplete"
    assert last.response.output_text == made.output_text


def test_a_response_streams(client: openai.OpenAI, number: str, says: str) -> None:
    events: list[Any] = list(client.responses.create(model=MODEL, input=asked(number), stream=True))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == says
    assert len(pieces) > 1
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == MESSAGE_EVENTS
    assert events[0].response.status == "in_progress"
    assert events[-1].response.usage.output_tokens > 0
    assert events[-1].response.output_text == says
    named = {event.item_id for event in events if hasattr(event, "item_id")}
    assert named == {events[-1].response.output[0].id}
    with client.responses.stream(model=MODEL, input=asked(number)) as stream:
        assert stream.get_final_response().output_text == says


def test_events_have_their_names(server: Process) -> None:
    body = {"input": "?", "max_output_tokens": 1, "stream": True}
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    for event in response.text.strip().split("\n\n"):
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_calls_whole_and_streamed_and_in_the_history(client: openai.OpenAI, number: str) -> None:
    asking: Any = {
        "model": MODEL, "tools": [TOOL], "tool_choice": {"type": "function", "name": "note"},
        "input": asked(number),
    }  # fmt: skip
    made: Any = client.responses.create(**asking)
    [call] = made.output
    assert (call.type, call.name, call.status) == ("function_call", "note", "completed")
    assert set(json.loads(call.arguments)) == {"number"}
    assert made.tool_choice.name == "note"
    events: list[Any] = list(client.responses.create(**asking, stream=True))
    kinds = [event.type for event in events]
    delta = "response.function_call_arguments.delta"
    assert [kind for kind in kinds if kind != delta] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert kinds.count(delta) > 1
    assert "".join(e.delta for e in events if e.type == delta) == call.arguments
    assert events[-1].response.output[0].arguments == call.arguments
    with client.responses.stream(**asking) as stream:
        final: Any = stream.get_final_response()
    assert final.output[0].arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "noted"}
    again: Any = client.responses.create(
        model=MODEL, input=[*asked(number), call, result], tools=[TOOL], max_output_tokens=4
    )
    assert again.usage.input_tokens > made.usage.input_tokens


def test_a_call_that_is_cut_off_is_none(client: openai.OpenAI, number: str) -> None:
    asking: Any = {
        "model": MODEL, "input": asked(number), "tools": [TOOL], "tool_choice": "required",
        "max_output_tokens": 22,
    }  # fmt: skip
    made = client.responses.create(**asking)
    assert (made.status, made.output) == ("incomplete", [])
    events: list[Any] = list(client.responses.create(**asking, stream=True))
    assert (events[-1].type, events[-1].response.output) == ("response.incomplete", [])
    assert "response.function_call_arguments.done" not in {event.type for event in events}


def test_a_form_is_kept_to(client: openai.OpenAI, number: str, says: str) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 9999}
    form: Any = {"type": "json_schema", "name": "number", "schema": schema}
    made: Any = client.responses.create(model=MODEL, input=asked(number), text={"format": form})
    assert made.output_text == says
    assert made.text.format.schema_ == schema
    made = client.responses.create(
        model=MODEL, input=asked(number), extra_body={"choices": ["1234", says]}
    )
    assert made.output_text == says
    assert made.model_extra["probabilities"][says] > 0.5


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_where_they_are_asked_for(
    client: openai.OpenAI, number: str, says: str, stream: bool
) -> None:
    made: Any = client.responses.create(
        model=MODEL, input=asked(number), include=["message.output_text.logprobs"],
        top_logprobs=2, stream=stream,
    )  # fmt: skip
    if stream:
        events = list(made)
        made = events[-1].response
    found = made.output[0].content[0].logprobs
    assert "".join(one.token for one in found if one.token[0] != "<").strip() == says
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in found)
    if stream:
        told = [x for e in events if e.type == "response.output_text.delta" for x in e.logprobs]
        assert [one.token for one in told] == [one.token for one in found][: len(told)]


def test_items_are_a_chat_s_messages() -> None:
    image = {"type": "input_image", "image_url": "data:,", "detail": "low"}
    said = {
        "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "4711", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    call = {
        "type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "note",
        "arguments": "{}", "status": "completed",
    }  # fmt: skip
    result = {"type": "function_call_output", "call_id": "call_1", "output": "noted"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    chat = chat_of(
        instructions="Read.",
        input=[{"role": "user", "content": [image]}, thought, said, call, result],
    )
    assert chat["messages"] == [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "4711"}], "tool_calls": [
            {"id": "call_1", "type": "function",
             "function": {"name": "note", "arguments": "{}"}}]},
        {"role": "tool", "content": "noted", "tool_call_id": "call_1"},
    ]  # fmt: skip
    assert chat_of(input="?")["messages"] == [{"role": "user", "content": "?"}]


def test_fields_are_a_chat_s_fields() -> None:
    chat = chat_of(
        input="?", max_output_tokens=7, temperature=0.5, tools=[TOOL], tool_choice="auto",
        text={"format": {"type": "json_object"}, "verbosity": "low"}, split=False,
        guided_regex="a", include=["message.output_text.logprobs"], top_logprobs=3,
    )  # fmt: skip
    expected = {
        "max_tokens": 7, "temperature": 0.5, "tool_choice": "auto", "split": False, "regex": "a",
        "logprobs": True, "top_logprobs": 3, "response_format": {"type": "json_object"},
    }  # fmt: skip
    assert {name: chat[name] for name in expected} == expected
    assert chat["tools"][0]["function"]["name"] == "note"
    harmless = dict.fromkeys(HARMLESS - {"metadata", "store", "user"}, "x")
    nothing = {"truncation": "disabled", "background": False, "reasoning": {"effort": "low"}}
    nulls: dict[str, Any] = {
        name: None for name in ResponsesRequest.model_fields if name != "input"
    }
    empty: dict[str, Any] = {"previous_response_id": None, "tools": []}
    for fields in (harmless, nothing, nulls, empty):
        assert chat_of(input="?", **fields) == chat_of(input="?")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"previous_response_id": "resp_1"}, "does not store responses"),
        ({"conversation": "conv_1"}, "does not store conversations"),
        ({"prompt": {"id": "p"}}, "does not store prompts"),
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"n": 2}, "a response has one answer"),
        ({"max_tokens": 3}, "max_output_tokens"),
        ({"response_format": {"type": "text"}}, "text.format"),
        ({"temprature": 1}, "temprature: no such field; the nearest known field is temperature"),
        ({"inptu": "?", "input": None}, "inptu: no such field; the nearest known field is input"),
        ({"max_output_token": 1}, "the nearest known field is max_output_tokens"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"top_logprobs": 2}, "top_logprobs needs message.output_text.logprobs in include"),
        ({"include": ["file_search_call.results"]}, "include.0: Input should be"),
        ({"tools": [{"type": "web_search"}]},
         "tools.0: found the type 'web_search', expected function"),
        ({"tools": [{**TOOL, "parameters": {"type": "array"}}]},
         "tools.0.parameters: found the type 'array', expected object"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "nte"}},
         "tool_choice names 'nte'"),
        ({"tool_choice": "required"}, "tool_choice requires a call"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}},
         "text.format"),
        ({"text": {"fromat": {}}}, "text.fromat: no such field; the nearest known field is format"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": 3}, "input: Input should be a valid"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0 refers to a stored item"),
        ({"input": [{"type": "computer_call"}]}, "input.0: Input tag 'computer_call' found"),
        ({"input": [{"role": "robot", "content": "?"}]}, "input.0.role: Input should be 'system'"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "input.0.content.0: Input tag 'input_audio' found"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
         "input.0.content.0: found none of file_data and file_url, expected one of them"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
         "input.0.content.0 has a file_id, but this server does not store files; send file_data"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_file", "file_data": "data:text/plain;base64,aGk="}]}]},
         "input.0.content.0.file_data: a file of 2 bytes is not a PDF file"),
        ({"input": [{"type": "reasoning", "id": "a"}]}, "input has only reasoning"),
        ({"instructions": "Be short.", "input": [
            {"type": "reasoning", "id": "a", "summary": []},
            {"type": "function_call", "call_id": "a", "name": "b", "arguments": "{}"},
            {"role": "user", "content": [
                {"type": "input_image", "image_url": "data:image/png;base64,?"}]}]},
         "input.2.content.0.image_url: the data URL does not contain valid base64"),
        ({"input": [
            {"type": "reasoning", "id": "a", "summary": []}, {"role": "user", "contnt": "?"}]},
         "input.1.contnt: no such field"),
        ({"input": [
            {"type": "function_call", "call_id": "a", "name": "b", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": [
                {"type": "input_image", "image_url": "data:image/png;base64,?"}]}]},
         "input.1.output.0.image_url: the data URL"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_file", "file_url": "http://example.com/a.pdf"}]}]},
         "does not download images"),
        ({"input": [{"type": "function_call_output", "call_id": "call_9", "output": "x"}]},
         "input.0.call_id is 'call_9', expected the id of an earlier call: none was made"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
         "input.0.content.0 has a file_id"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": "{"}]},
         "the arguments of a call are not valid JSON"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "http://example.com/a.png"}]}]},
         "does not download images"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_is_not_understood_is_said(
    server: Process, fields: dict[str, Any], expected: str
) -> None:
    asked = {"input": "?", "max_output_tokens": 1, **fields}
    response = post(server, asked, route="responses")
    assert response.status_code == 400, response.text
    assert expected in message(response)
