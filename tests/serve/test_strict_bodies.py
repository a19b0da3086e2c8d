"""A body means one thing, and none of its fields is passed over in silence."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from tests.serve.conftest import Process
from tests.serve.test_refusals import message

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "hi"},
    "/plan": {"width": 100, "height": 100},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}


def post(server: Process, path: str, content: str | bytes | dict[str, Any]) -> httpx.Response:
    made = json.dumps(content) if isinstance(content, dict) else content
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + path, content=made, headers=headers, timeout=60)


def refused(response: httpx.Response, param: str | None) -> str:
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    return message(response)


@pytest.mark.parametrize("path", ROUTES)
def test_a_repeated_key_is_refused_by_its_name(server: Process, path: str) -> None:
    for colon in (":", " \t\r\n:"):
        body = json.dumps(ROUTES[path])[:-1] + f', "model"{colon}"a", "model"{colon}"b"}}'
        said = refused(post(server, path, body), "model")
        assert said == "an object has the key 'model' more than once"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("number", "shown"), [("NaN", "nan"), ("Infinity", "inf"), ("-1e999", "-inf")]
)
def test_a_number_that_is_not_finite_is_refused_by_its_place(
    server: Process, path: str, number: str, shown: str
) -> None:
    body = json.dumps(ROUTES[path])[:-1] + f', "metadata": {{"a": [1, {number}]}}}}'
    said = refused(post(server, path, body), "metadata.a.1")
    assert said == f"metadata.a.1 is {shown}, expected a finite number"


@pytest.mark.parametrize("path", ROUTES)
def test_half_a_surrogate_pair_and_other_encodings_are_refused(server: Process, path: str) -> None:
    body = json.dumps(ROUTES[path])
    said = refused(post(server, path, body[:-1] + ', "model": "\\ud800"}'), "model")
    assert said == "model is not valid Unicode: it contains a lone surrogate"
    # Characters whose second byte is a quote hid the values of such a body from being counted.
    for coding in ("utf-16", "utf-32"):
        said = refused(post(server, path, body.encode(coding)), None)
        assert said == f"the body is in {coding.upper()}, expected UTF-8"


def test_keys_within_texts_are_not_repeated_keys(server: Process) -> None:
    text = '{"a":1, "a" : 2}'
    body = {**CHAT, "messages": [{"role": "user", "content": text}], "metadata": {"a": {"a": "a"}}}
    assert post(server, "/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"const": 1, "const": 2}', "an object has the key 'const' more than once"),
        ('{"const": NaN}', "const is nan, expected a finite number"),
        ('{"const": "\\ud800"}', "const is not valid Unicode: it contains a lone surrogate"),
        ("[" + "[]," * 200_000 + "[]]", "it has more than 100,000 values"),
    ],
    ids=lambda text: text[:20],
)
def test_json_within_texts_means_one_thing_too(server: Process, text: str, expected: str) -> None:
    said = refused(
        post(server, "/v1/chat/completions", {**CHAT, "guided_json": text}), "guided_json"
    )
    assert said == f"guided_json is not valid JSON: {expected}"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    said = {"role": "assistant", "tool_calls": [call]}  # type: ignore[assignment]
    body = {**CHAT, "messages": [*CHAT["messages"], said]}
    place = "messages.1.tool_calls.0.function.arguments"
    assert expected in refused(post(server, "/v1/chat/completions", body), place)


def test_repeated_keys_among_very_many_are_found_at_once(server: Process) -> None:
    keys = ",".join(f'"k{number}":1' for number in range(60_000))
    began = time.monotonic()
    said = refused(post(server, "/plan", f'{{{keys},"k59999":1}}'), "k59999")
    assert said == "an object has the key 'k59999' more than once"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_stream_options_need_a_stream(server: Process, path: str) -> None:
    options = {"stream_options": {"include_usage": True}}
    for more in ({}, {"stream": False}):
        said = refused(post(server, path, {**ROUTES[path], **options, **more}), "stream_options")
        assert said == "stream_options is only allowed with stream: true"
    assert post(server, path, {**ROUTES[path], **options, "stream": True}).status_code == 200
    padded = {"stream": True, "stream_options": {"include_obfuscation": True}}
    refused(post(server, path, {**ROUTES[path], **padded}), "stream_options.include_obfuscation")


@pytest.mark.parametrize(
    ("path", "more", "param", "expected"),
    [
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 2},
            "max_tokens",
            "max_tokens is 1 and max_completion_tokens is 2, expected only one of them",
        ),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "text", "schema": {"const": 1}}},
            "response_format",
            "response_format: found schema with the type text, expected json_schema",
        ),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_object", "json_schema": {"name": "a"}}},
            "response_format",
            "response_format: found json_schema with the type json_object, expected json_schema",
        ),
        (
            "/v1/chat/completions",
            {"choices": ["a", "b"], "temperature": 1, "top_p": 0.5},
            "choices",
            "choices: found choices and top_p, which cannot be combined",
        ),
        (
            "/v1/chat/completions",
            {"choices": ["a", "b"], "logprobs": True},
            "choices",
            "choices: found choices and logprobs, which cannot be combined",
        ),
        ("/plan", {"preview": True}, "preview", "a size has no preview; leave it out"),
        ("/tokenize", {"content": "ho"}, "content", "found prompt and content, expected only one"),
        (
            "/tokenize",
            {"messages": CHAT["messages"]},
            "messages",
            "found prompt and messages, expected only one",
        ),
        (
            "/tokenize",
            {"add_special": True, "add_special_tokens": False},
            "add_special",
            "found add_special_tokens and add_special, expected only one",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_without_effect_is_refused(
    server: Process, path: str, more: dict[str, Any], param: str | None, expected: str
) -> None:
    said = refused(post(server, path, {**ROUTES[path], **more}), param)
    assert said.startswith(expected)
