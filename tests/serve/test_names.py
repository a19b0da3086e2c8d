"""Fields under the names that other servers and clients give them; none is ignored in silence."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serve.conftest import EXAMPLES, Process
from tests.serve.test_chat import QUESTION, asking
from tests.serve.test_refusals import message, post

from smolstack.errors import SmolstackError
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.request_fields import normalize_fields
from smolstack.serve.request_options import _is_sum
from smolstack.serve.request_reader import _from_data_url
from smolstack.serve.schemas import ChatRequest

USER = [{"role": "user", "content": "?"}]


def read(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": USER, **fields})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"guided_choice": ["a", "b"]}, {"choices": ["a", "b"]}),
        ({"guided_regex": "[0-9]"}, {"regex": "[0-9]"}),
        ({"guided_json": {"type": "integer"}}, {"json_schema": {"type": "integer"}}),
        ({"guided_json": '{"type": "integer"}'}, {"json_schema": {"type": "integer"}}),
        ({"guided_json": {"const": None}}, {"json_schema": {"const": None}}),
        ({"structured_outputs": {"choice": ["a"]}}, {"choices": ["a"]}),
        ({"structured_outputs": {"regex": "a", "json": None}}, {"regex": "a"}),
        ({"structured_outputs": {"json": {"type": "null"}}}, {"json_schema": {"type": "null"}}),
        ({"skip_special_tokens": False}, {"keep_special_tokens": True}),
        ({"skip_special_tokens": True}, {"keep_special_tokens": False}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"n_predict": 7}, {"max_tokens": 7}),
        ({"n_predict": -1}, {"max_tokens": None}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_other_servers_names_are_understood(theirs: Any, ours: Any) -> None:
    assert read(**theirs).model_dump(include=set(ours)) == ours


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"tools": [], "functions": [], "function_call": "none"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1},
        {"echo": False, "ignore_eos": False, "min_tokens": 0, "bad_words": [], "mirostat": 0},
        {"modalities": ["text"], "typical_p": 1.0, "length_penalty": 1.0, "cache_prompt": True},
        {name: None for name in ChatRequest.model_fields if name != "messages"},
        {"temprature": None, "tools": None, "response_format": None, "logprobs": None},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_accepted(fields: Any) -> None:
    assert read(**fields) == read()


def test_a_null_is_as_good_as_nothing_at_every_depth() -> None:
    request = read(
        response_format={"type": "json_object", "json_schema": None, "strict": None},
        stream_options={"include_usage": None, "include_obfuscation": None},
    )
    assert request == read(response_format={"type": "json_object"}, stream_options={})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temprature": 1}, "temprature: no such field; the nearest known field is temperature"),
        ({"guided_regx": "a"}, "the nearest known field is guided_regex"),
        ({"max_token": 3}, "the nearest known field is max_tokens"),
        ({"xyzzy": 1}, "xyzzy: no such field"),
        ({"length_penalty": 0.5}, "length_penalty is not supported (found 0.5); leave it"),
        ({"n": True}, "n: found true, expected a number"),
        ({"temperature": False}, "temperature: found false, expected a number"),
        ({"min_tokens": 5}, "min_tokens is 5, expected at most max_new_tokens, 1"),
        ({"presence_penalty": 3}, "presence_penalty: Input should be less than or equal to 2"),
        ({"regex": "[^\\s\\S]"}, "no answer can satisfy"),
        ({"structured_outputs": {"structural_tag": "a"}},
         "structured_outputs.structural_tag is not supported"),
        ({"guided_regex": "a", "regex": "b"}, "guided_regex and regex have different values"),
        ({"guided_json": "{"}, "guided_json is not valid JSON"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens is 'no', expected true or false"),
        ({"response_format": {"type": "text", "jsonschema": {}}},
         "response_format.jsonschema: no such field; the nearest known field is json_schema"),
        ({"messages": [{"role": "user", "content": "?", "contnt": "!"}]},
         "messages.0.contnt: no such field; the nearest known field is content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "messages.0.content.0.text: Input should be a valid string"),
        ({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "?"},
            {"type": "image_url", "image_url": {"url": "data:", "detial": "low"}}]}]},
         "messages.0.content.1.image_url.detial: no such field; the nearest known field is detail"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: Field required"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_its_name_and_place(
    server: Process, fields: dict[str, Any], expected: str
) -> None:
    response = post(server, {"messages": USER, "max_tokens": 1, **fields})
    assert response.status_code == 400, response.text
    assert expected in message(response)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_json": {"type": "foo"}}, "guided_json"),
        ({"guided_json": {"type": "object"}, "stop": ["a"]}, "guided_json"),
        ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_json"),
        ({"guided_json": {"type": "object"}, "min_tokens": 1}, "guided_json"),
        ({"structured_outputs": {"json": {"type": "foo"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"json_schema": {"type": "foo"}}, "json_schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": "foo"}}},
         "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_regex": "[^\\s\\S]"}, "guided_regex"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"regex": "("}, "regex"),
        ({"guided_choice": ["a", ""]}, "guided_choice.1"),
        ({"guided_choice": ["a", "a"]}, "guided_choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
        ({"guided_choice": ["a"], "logprobs": True}, "guided_choice"),
        ({"guided_grammar": "x: y"}, "guided_grammar"),
        ({"structured_outputs": {"grammar": "start: y"}}, "structured_outputs.grammar"),
        ({"repeat_penalty": 101}, "repeat_penalty"),
        ({"guided_regex": "a", "tools": [{"type": "function", "function": {"name": "f"}}]},
         "guided_regex"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_names_the_field_as_the_client_does(
    server: Process, fields: dict[str, Any], name: str
) -> None:
    response = post(server, {"messages": USER, "max_tokens": 1, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == name
    assert name in message(response)


@pytest.mark.parametrize(
    ("route", "body", "name"),
    [
        ("completions", {"prompt": "a", "guided_json": {"type": "foo"}}, "guided_json"),
        ("responses", {"input": "a", "guided_json": {"type": "foo"}}, "guided_json"),
        ("responses", {"input": "a", "text": {"format": {
            "type": "json_schema", "name": "a", "schema": {"type": "foo"}}}}, "text.format"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_names_the_field_in_every_route(
    server: Process, route: str, body: dict[str, Any], name: str
) -> None:
    response = post(server, body, route=route)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == name
    assert message(response) == f"{name}: the schema is not supported: Invalid type: foo"


def test_an_assistant_s_turn_as_clients_send_it_back() -> None:
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    request = read(messages=[*USER, turn, *USER])
    assert request.messages[1].content == ""
    assert read(messages=[*USER, {**turn, "content": "yes"}]).messages[1].content == "yes"


def test_an_image_may_be_a_string() -> None:
    part = {"type": "image_url", "image_url": "data:image/png;base64,AAAA", "uuid": "x"}
    request = read(messages=[{"role": "user", "content": [part]}])
    content: Any = request.messages[0].content
    assert content[0].image_url.url == "data:image/png;base64,AAAA"


CONTENT = bytes(range(256)) + b"?"
CODED = base64.b64encode(CONTENT).decode()
QUOTED = CODED.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{CODED}",
        f"DATA:IMAGE/PNG;BASE64,{CODED}",
        f" data: image/png ; base64 , {CODED} ",
        f"data:image/png;charset=utf-8;base64,{CODED}",
        f"data:;base64,{CODED}",
        f"data:image/png;base64,{CODED[:80]}\r\n{CODED[80:]}\n",
        f"data:image/png;base64,{CODED.rstrip('=')}",
        f"data:image/png;base64,{CODED.replace('+', '-').replace('/', '_')}",
        f"data:image/png;base64,{QUOTED}",
    ],
    ids=lambda url: url[:30],
)
def test_a_data_url_is_read_as_browsers_read_it(url: str) -> None:
    assert _from_data_url(url) == CONTENT


@pytest.mark.parametrize(
    "url", ["data:image/png,AAAA", "data:image/png;base64,A", "data:;base64,é"]
)
def test_what_is_no_base64_is_refused(url: str) -> None:
    with pytest.raises(RefusedError):
        _from_data_url(url)


def test_a_schema_without_additional_properties_lets_no_others_be_invented(
    server: Process, number: str
) -> None:
    # The reader has never seen JSON: what is not forbidden, it would go on inventing.
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        {"response_format": {"type": "json_object", "schema": schema}},
        {"guided_json": schema},
        {"structured_outputs": {"json": schema}},
    ):
        response = post(server, {"messages": asking(number), "max_tokens": 60, **fields})
        assert response.json()["choices"][0]["message"]["content"] == '{"a": "x"}', fields


def test_the_number_is_right_in_the_form_that_the_page_shows(
    server: Process, number: str, reader: Any
) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 9999}
    answer = reader.ask(EXAMPLES / "number.png", QUESTION, schema=schema)
    assert (answer.text, answer.parsed) == ("4711", 4711)
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    response = post(server, {"messages": asking(number), "response_format": form})
    assert response.json()["choices"][0]["message"]["content"] == "4711"


def test_a_schema_that_is_a_sum_of_others_stays_as_it_is() -> None:
    one: dict[str, Any] = {"properties": {"a": {}}}
    assert _is_sum({"allOf": [one, {"properties": {"b": {}}}]})
    assert _is_sum({"items": {**one, "anyOf": [{"required": ["a"]}]}})
    assert not _is_sum({**one, "$defs": {"x": one}})
    assert not _is_sum({"properties": {"c": {"allOf": [{"$ref": "#/$defs/x"}], "default": 1}}})
    assert not _is_sum({"anyOf": [one, {"type": "null"}]})


def test_nothing_but_an_object_is_left_to_the_schema() -> None:
    nothing: list[Any] = [[], "text", 3, None]
    assert [normalize_fields(data) for data in nothing] == nothing
    deep: Any = {}
    for _ in range(5000):
        deep = {"in": deep}
    with pytest.raises((RefusedError, SmolstackError), match="nested too deeply"):
        normalize_fields({"messages": [deep]})


def test_a_body_needs_no_content_type_but_no_other_one(server: Process) -> None:
    url = f"{server.url}/v1/chat/completions"
    body = b'{"messages": [{"role": "user", "content": "?"}], "max_tokens": 1}'
    assert httpx.post(url, content=body, timeout=60).status_code == 200
    kinds = {"application/json; charset=utf-8": 200, "text/plain": 415, "multipart/form-data": 415}
    for kind, status in kinds.items():
        response = httpx.post(url, content=body, headers={"Content-Type": kind}, timeout=60)
        assert response.status_code == status
    assert "Content-Type is multipart/form-data, expected application/json" in message(response)


def test_where_a_body_is_no_json(server: Process) -> None:
    response = post(server, '{"messages": [\n  {"role": "user",, }\n]}')
    assert message(response) == (
        "the body is not valid JSON: Expecting property name enclosed in double quotes "
        "at line 2, column 19"
    )


def test_where_a_body_is_nested_too_deeply(server: Process) -> None:
    response = post(server, "\n" + "[" * 50_000)
    assert response.status_code == 400
    assert message(response) == (
        "the body cannot be parsed: it is nested too deeply at line 2, column 500"
    )


def test_an_address_that_is_no_route_names_the_routes(server: Process) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completion", json={})
    assert response.status_code == 404
    assert message(response).startswith("no route POST /v1/chat/completion; the routes are GET")
    assert "POST /v1/chat/completions" in message(response)
    response = httpx.get(f"{server.url}/plan")
    assert response.status_code == 405
    assert message(response) == "GET /plan is not supported, expected the method POST"


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/"])
def test_a_head_is_a_get_without_its_body(server: Process, path: str) -> None:
    asked = httpx.get(server.url + path)
    head = httpx.head(server.url + path)
    assert head.status_code == asked.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == str(len(asked.content))


def test_tokens_of_texts_and_chats(server: Process, reader: Any, number: str) -> None:
    def tokens(body: dict[str, Any]) -> Any:
        response = httpx.post(f"{server.url}/tokenize", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    tokenizer = reader.processor.tokenizer
    said = tokens({"prompt": "4711", "add_special_tokens": False})
    assert said["tokens"] == tokenizer.encode("4711", special=False)
    assert said["count"] == len(said["tokens"])
    assert said["max_model_len"] == reader.config.text.max_positions
    assert tokens({"content": "4711"})["tokens"] == said["tokens"]  # as llama.cpp's clients ask
    chat = tokens({"messages": asking(number)})
    expected = reader.processor.prepare((EXAMPLES / "number.png", QUESTION))
    assert chat["tokens"] == list(expected.token_ids)
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": said["tokens"]}).json()
    assert back == {"prompt": "4711", "content": "4711"}
    wrong = httpx.post(f"{server.url}/detokenize", json={"tokens": [10**6]})
    assert wrong.status_code == 400
    nothing = httpx.post(f"{server.url}/tokenize", json={})
    assert "one of prompt, content and messages" in message(nothing)


def test_visual_tokens_have_their_usual_name_too(server: Process, number: str) -> None:
    response = post(server, {"messages": asking(number), "max_tokens": 2})
    details = response.json()["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == details["visual_tokens"] > 0


def test_the_page_lists_every_name(request: pytest.FixtureRequest) -> None:
    from smolstack.serve.request_fields import ALIASES, HARMLESS, NEUTRAL

    page = (Path(request.config.rootpath) / "docs" / "serving.md").read_text()
    missing = [name for name in (*ALIASES, *HARMLESS, *NEUTRAL) if f"`{name}`" not in page]
    assert missing == []
