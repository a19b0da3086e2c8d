"""Texts that are continued, by the openai client as it is installed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serve.conftest import Process, serving
from tests.serve.test_chat import MODEL, QUESTION, asking
from tests.serve.test_refusals import message, post

import smolstack
from smolstack.serve.server import Server
from smolstack.serve.settings import ServerSettings

CHAT = "<|im_start|>User: What does it say?<end_of_utterance>\nAssistant:"


def texts(made: Any) -> list[str]:
    return [choice.text for choice in made.choices]


def streamed(chunks: Any) -> dict[int, str]:
    """What a stream says of each answer."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + choice.text
    return found


def test_a_prompt_that_spells_the_template_is_answered_as_a_chat(
    client: openai.OpenAI, reader: smolstack.VLM
) -> None:
    made = client.completions.create(model=MODEL, prompt=CHAT, max_tokens=12)
    expected = client.chat.completions.create(model=MODEL, messages=asking(), max_tokens=12)
    assert (made.object, made.id[:5]) == ("text_completion", "cmpl-")
    assert made.usage is not None
    assert expected.usage is not None
    assert made.usage.prompt_tokens == expected.usage.prompt_tokens
    assert made.choices[0].text.strip() == expected.choices[0].message.content
    ids = reader.processor.tokenizer.encode(CHAT)
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=12)
    assert texts(by_ids) == texts(made)


def test_white_space_is_part_of_a_continued_text(
    client: openai.OpenAI, reader: smolstack.VLM
) -> None:
    lead = reader.processor.answer_lead
    assert lead == " "
    made = client.completions.create(model=MODEL, prompt=CHAT, max_tokens=4)
    assert made.choices[0].text.startswith(lead)
    stream = client.completions.create(model=MODEL, prompt=CHAT, max_tokens=4, stream=True)
    assert streamed(stream) == {0: made.choices[0].text}


def test_sixteen_tokens_unless_more_are_asked_for(tight: Process) -> None:
    with tight.client("secret") as client:
        made: Any = client.completions.create(
            model="tiny", prompt="?", extra_body={"ignore_eos": True}
        )
    assert (made.usage.completion_tokens, made.choices[0].finish_reason) == (16, "length")


def test_several_prompts_and_answers_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": ["One", "Two"], "n": 2, "seed": 7, "temperature": 3,
        "max_tokens": 6, "echo": True,
    }  # fmt: skip
    made = client.completions.create(**asked)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert [text[:3] for text in texts(made)] == ["One", "One", "Two", "Two"]
    assert len(set(texts(made))) == 4
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert streamed(chunks) == dict(enumerate(texts(made)))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert made.usage is not None
    assert chunks[-1].usage.prompt_tokens == made.usage.prompt_tokens
    ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert len(ends) == 4
    alone = client.completions.create(**{**asked, "prompt": "One"})
    assert texts(alone) == texts(made)[:2]
    assert alone.usage is not None
    assert made.usage.prompt_tokens > alone.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_tell_tokens_and_their_places(client: openai.OpenAI, stream: bool) -> None:
    made: Any = client.completions.create(
        model=MODEL, prompt=CHAT, max_tokens=5, logprobs=2, stream=stream
    )
    found: dict[str, list[Any]] = {}
    text = ""
    for part in made if stream else [made]:
        for choice in part.choices:
            text += choice.text
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                found.setdefault(name, []).extend(values)
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"])
    for token, logprob, top, place in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], found["text_offset"],
        strict=True,
    ):  # fmt: skip
        assert 2 <= len(top) <= 3
        assert top[token] == pytest.approx(logprob)
        assert logprob == pytest.approx(max(top.values()), abs=1e-5)  # greedy
        assert text[place:].startswith(token) or token.startswith("<")


def test_forms_are_kept_to_from_the_first_character(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=MODEL, prompt="No.", max_tokens=8, extra_body={"regex": "-[0-9]{3}"}
    )
    assert made.choices[0].text[0] == "-"
    assert made.choices[0].text[1:].isdigit()
    made = client.completions.create(
        model=MODEL, prompt="No.", extra_body={"structured_outputs": {"choice": [" 12", "12"]}}
    )
    assert made.choices[0].text in (" 12", "12")
    found: Any = made.choices[0].model_extra
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    made = client.completions.create(
        model=MODEL, prompt="No.", max_tokens=8,
        extra_body={"response_format": {"type": "json_schema", "json_schema": {
            "schema": {"type": "integer", "minimum": 0, "maximum": 9}}}},
    )  # fmt: skip
    assert made.choices[0].text in set("0123456789")


def test_a_stop_string_ends_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=CHAT, max_tokens=12).choices[0].text
    made = client.completions.create(model=MODEL, prompt=CHAT, max_tokens=12, stop=whole[3])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (
        whole[: whole.index(whole[3])],
        "stop",
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": []}, "prompt: expected a text, a list of texts"),
        ({"prompt": 3}, "prompt: expected a text, a list of texts"),
        ({"prompt": ["a", 3]}, "prompt.1: Input should be a valid string"),
        ({"prompt": [1, "a"]}, "prompt.1: Input should be a valid integer"),
        ({"prompt": [[1], []]}, "prompt.1: List should have at least 1 item"),
        ({"prompt": [1_000_000]}, "token id 1000000"),
        ({"prompt": "a <image> b"}, "the prompt contains <image>"),
        ({"prompt": "long " * 90_000}, "450,000 characters"),
        ({"prompt": "long " * 3000}, "the model's context"),
        ({"prompt": ["a"] * 5, "n": 2}, "n is 2 and there are 5 prompts, at most 8 answers"),
        ({"suffix": "b"}, "suffix is not supported"),
        ({"echo": True, "logprobs": 1}, "found echo and logprobs"),
        ({"best_of": 3}, "best_of is 3 and n is 1"),
        ({"logprobs": True}, "logprobs: found true, expected a number"),
        ({"messages": []}, "/v1/chat/completions"),
        ({"temprature": 1}, "temprature: no such field; the nearest known field is temperature"),
        ({"promt": "a", "prompt": None}, "promt: no such field; the nearest known field is prompt"),
        ({"tools": [{}]}, "tools is not supported (found [{}]); leave it out"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_not_understood_is_said(
    server: Process, fields: dict[str, Any], expected: str
) -> None:
    asked = {"prompt": "?", "max_tokens": 1, **fields}
    response = post(server, asked, route="completions")
    assert response.status_code == 400, response.text
    assert expected in message(response)


def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=3)
    made = client.completions.create(
        model=MODEL, prompt=QUESTION, max_tokens=3, suffix="", best_of=1, echo=False, user="me",
        logit_bias={}, presence_penalty=0, extra_body={"add_special_tokens": True, "tools": []},
    )  # fmt: skip
    assert texts(made) == texts(plain)


def test_no_chat_template_is_needed(
    tiny_vlm: smolstack.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_vlm.processor, "template", None)
    server = Server(tiny_vlm, ServerSettings())
    body = {"prompt": "?", "regex": "[ab]{3}"}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", json=body)

    try:
        response = asyncio.run(ask())
    finally:
        server.close()
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["text"]
    assert len(text) == 3
    assert set(text) <= {"a", "b"}


def test_a_retrieval_model_continues_nothing(retrieval_folder: Path) -> None:
    with serving("--model", str(retrieval_folder)) as server:
        for route, asked in (("completions", {"prompt": "?"}), ("responses", {"input": "?"})):
            response = httpx.post(f"{server.url}/v1/{route}", json=asked, timeout=60)
            assert response.status_code == 400
            assert "embedding head" in message(response)
