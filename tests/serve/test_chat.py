"""The openai client, as it is installed, against a real server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from tests.serve.conftest import EXAMPLES, Process

import smolstack

MODEL = "smolstack-reader"
QUESTION = "What does it say?"


def asking(*images: str, text: str = QUESTION) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_an_image_is_read(client: openai.OpenAI, reader: smolstack.VLM, number: str) -> None:
    made = client.chat.completions.create(model=MODEL, messages=asking(number))
    expected = reader.ask(EXAMPLES / "number.png", QUESTION)
    assert made.choices[0].message.content == expected.text
    assert made.choices[0].finish_reason == "stop"
    assert made.usage is not None
    assert made.usage.prompt_tokens == expected.usage.prompt_tokens
    assert made.usage.completion_tokens == expected.usage.completion_tokens


def test_an_answer_streams_and_ends_with_its_usage(
    client: openai.OpenAI, number: str, says: str
) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=asking(number),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == says
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > chunks[-1].usage.completion_tokens


def test_several_images_and_turns(
    client: openai.OpenAI, reader: smolstack.VLM, number: str
) -> None:
    chat = [
        {"role": "system", "content": "You read numbers."},
        *asking(number, number, text="Both?"),
        {"role": "assistant", "content": "4711"},
        {"role": "user", "content": "Again?"},
    ]
    made = client.chat.completions.create(model=MODEL, messages=chat, max_tokens=8)
    path = EXAMPLES / "number.png"
    ours: list[Any] = [dict(message) for message in chat]
    ours[1] = {
        "role": "user",
        "content": [{"type": "image", "image": path}] * 2 + [{"type": "text", "text": "Both?"}],
    }
    expected = reader.ask(messages=ours, max_new_tokens=8)
    assert made.choices[0].message.content == expected.text
    assert made.usage is not None
    assert made.usage.prompt_tokens == expected.usage.prompt_tokens


def test_a_seed_gives_the_same_several_answers_again(client: openai.OpenAI, number: str) -> None:
    def ask(seed: int) -> list[str | None]:
        made = client.chat.completions.create(
            model=MODEL, messages=asking(number), n=4, seed=seed, temperature=3, max_tokens=12
        )
        return [choice.message.content for choice in made.choices]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) > 1


def test_sampling_is_that_of_ask(client: openai.OpenAI, reader: smolstack.VLM, number: str) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=asking(number), seed=5, temperature=2, top_p=0.9, max_tokens=12
    )
    expected = reader.ask(
        EXAMPLES / "number.png", QUESTION, seed=5, temperature=2, top_p=0.9, max_new_tokens=12
    )
    assert made.choices[0].message.content == expected.text


def test_a_stop_string_ends_an_answer(client: openai.OpenAI, number: str, says: str) -> None:
    made = client.chat.completions.create(model=MODEL, messages=asking(number), stop=[says[2:]])
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == (says[:2], "stop")
    made = client.chat.completions.create(model=MODEL, messages=asking(number), max_tokens=6)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == (says[:2], "length")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_tell_how_likely_each_token_was(
    client: openai.OpenAI, number: str, says: str, stream: bool
) -> None:
    made: Any = client.chat.completions.create(
        model=MODEL, messages=asking(number), logprobs=True, top_logprobs=3, stream=stream
    )
    tokens: list[Any] = []
    for part in made if stream else [made]:
        for choice in part.choices:
            tokens += choice.logprobs.content if choice.logprobs else []
    written = [token.token for token in tokens if not token.token.startswith("<")]
    assert "".join(written).strip() == says  # among tokens that decoding leaves out
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-5)


def test_an_answer_keeps_to_a_json_schema(client: openai.OpenAI, number: str) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["number", "word"]}, "digits": {"pattern": "^[0-9]{4}$"}},
        "required": ["kind", "digits"],
        "additionalProperties": False,
    }
    schema["properties"]["digits"]["type"] = "string"  # type: ignore[index]
    made = client.chat.completions.create(
        model=MODEL,
        messages=asking(number),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "reading", "schema": schema, "strict": True},
        },
    )
    found = json.loads(made.choices[0].message.content or "")
    assert found["kind"] in ("number", "word")
    assert len(found["digits"]) == 4
    assert made.choices[0].finish_reason == "stop"


def test_json_that_is_cut_off_says_so(client: openai.OpenAI, number: str) -> None:
    made = client.chat.completions.create(
        model=MODEL,
        messages=asking(number),
        response_format={"type": "json_object"},
        max_tokens=4,
    )
    assert made.choices[0].finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(made.choices[0].message.content or "")


def test_choices_come_with_their_probabilities(
    client: openai.OpenAI, number: str, says: str
) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=asking(number), extra_body={"choices": ["1234", says, "47"]}
    )
    choice = made.choices[0]
    assert choice.message.content == says
    found = choice.model_extra["probabilities"]  # type: ignore[index]
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.get) == says


def test_an_image_is_encoded_once_for_many_requests(
    server: Process, client: openai.OpenAI, number: str
) -> None:
    client.chat.completions.create(model=MODEL, messages=asking(number))
    before = server.metric("images_total")
    for text in ("One?", "Two?", "Three?"):
        client.chat.completions.create(model=MODEL, messages=asking(number, text=text))
    assert server.metric("images_total") == before


def test_the_model_has_a_name_and_a_context(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt-9")
