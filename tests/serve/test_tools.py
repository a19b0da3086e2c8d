"""Functions are called as OpenAI's clients expect, and never with arguments that are invalid."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from tests.serve.conftest import Process

from smolstack.generation.tool_calls import Began, CallReader, Continued, split, written

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12, "pattern": "^[a-zA-Z ]*$"},
                "unit": {"enum": ["c", "f"]},
            },
            "required": ["city", "unit"],
        },
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop_all"}}
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


def is_weather(arguments: str) -> bool:
    found = json.loads(arguments)
    return set(found) == {"city", "unit"} and found["unit"] in ("c", "f")


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
def test_a_call_that_is_asked_for_is_made(client: Any, choice: Any) -> None:
    said = client.chat.completions.create(
        model="", messages=ASKED, tools=[WEATHER], tool_choice=choice, max_tokens=200
    )
    (chosen,) = said.choices
    assert chosen.finish_reason == "tool_calls"
    assert chosen.message.content is None
    (call,) = chosen.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert is_weather(call.function.arguments)


def test_a_call_is_streamed_as_the_whole_answer_has_it(client: Any) -> None:
    options: Any = {
        "model": "", "messages": ASKED, "tools": [WEATHER, STOP], "tool_choice": "required",
        "max_tokens": 200,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0].message.tool_calls[0].function
    name, arguments, reasons, ids = "", "", [], set()
    for chunk in client.chat.completions.create(**options, stream=True):
        (chosen,) = chunk.choices
        assert not chosen.delta.content
        for part in chosen.delta.tool_calls or []:
            assert part.index == 0
            name += part.function.name or ""
            arguments += part.function.arguments or ""
            ids |= {part.id} - {None}
        reasons.append(chosen.finish_reason)
    assert (name, arguments) == (whole.name, whole.arguments)
    assert reasons[-1] == "tool_calls"
    assert len(ids) == 1


def test_nothing_is_called_where_that_is_asked_for(client: Any) -> None:
    plain = client.chat.completions.create(model="", messages=ASKED, max_tokens=8)
    said = client.chat.completions.create(
        model="", messages=ASKED, tools=[WEATHER], tool_choice="none", max_tokens=8
    )
    assert said.choices[0].message.content == plain.choices[0].message.content
    assert said.choices[0].message.tool_calls is None


def test_a_text_may_be_the_answer_where_calls_are_left_to_the_model(
    client: Any,
) -> None:
    said = client.chat.completions.create(
        model="", messages=ASKED, tools=[WEATHER], max_tokens=40
    ).choices[0]
    assert said.message.content or said.message.tool_calls
    for call in said.message.tool_calls or []:
        assert is_weather(call.function.arguments)


def test_a_call_that_is_cut_off_is_none(client: Any) -> None:
    said = client.chat.completions.create(
        model="", messages=ASKED, tools=[WEATHER], tool_choice="required", max_tokens=9
    ).choices[0]
    assert (said.finish_reason, said.message.tool_calls) == ("length", None)


def test_calls_and_their_results_are_part_of_a_history(client: Any) -> None:
    call = {"id": "call_1", "type": "function"}
    function = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "c"}'}
    history: Any = [
        {"role": "system", "content": "Be short."},
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [{**call, "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]
    said = client.chat.completions.create(
        model="", messages=history, tools=[WEATHER], tool_choice="none", max_tokens=4
    )
    shorter = client.chat.completions.create(model="", messages=history[:2], max_tokens=4)
    assert said.usage is not None
    assert shorter.usage is not None
    assert said.usage.prompt_tokens > shorter.usage.prompt_tokens + 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice names"),
        ({"tools": [WEATHER, WEATHER]}, "get_weather twice"),
        ({"tools": [], "tool_choice": "required"}, "tools has none"),
        ({"stop": ["x"]}, "found stop beside tools"),
        ({"regex": "a+"}, "found regex beside tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}]},
            "the tools cannot be kept to",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}]}]},
            "expected a JSON object",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused(client: Any, change: dict[str, Any], says: str) -> None:
    body = {"messages": ASKED, "tools": [WEATHER], **change}
    with pytest.raises(openai.BadRequestError, match=says):
        client.post("/chat/completions", body=body, cast_to=dict)


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=12, pattern="^[a-z]*$")
    degrees: int = Field(ge=-50, le=60)


def test_instructor_gets_its_object(server: Process) -> None:
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(server.client())
    found = client.chat.completions.create(
        model="", messages=ASKED, response_model=Weather, max_tokens=200
    )
    assert isinstance(found, Weather)


def test_langchain_gets_its_object_and_its_calls(server: Process) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        model="m", base_url=f"{server.url}/v1", api_key="none", max_tokens=200, max_retries=0
    )
    assert isinstance(chat.with_structured_output(Weather).invoke("Paris?"), Weather)
    calling = chat.with_structured_output(Weather, method="function_calling")
    assert isinstance(calling.invoke("Paris?"), Weather)
    said = chat.bind_tools([Weather], tool_choice="any").invoke("Paris?")
    (call,) = said.tool_calls
    assert Weather(**call["args"])


def test_pydantic_ai_gets_its_object(server: Process) -> None:
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    agent = ai.Agent(models.OpenAIChatModel("m", provider=provider), output_type=Weather)
    assert isinstance(agent.run_sync("Paris?").output, Weather)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    calls=st.lists(
        st.tuples(st.from_regex("[a-z_]{1,9}", fullmatch=True), st.dictionaries(st.text(), JSON)),
        min_size=1,
        max_size=3,
    ),
    size=st.integers(1, 9),
)
def test_calls_come_out_as_they_were_written_however_they_arrive(
    calls: list[tuple[str, Any]], size: int
) -> None:
    expected = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = "\n".join(written(*call) for call in expected)
    said, found = split(text)
    assert said == ""
    assert [(call.name, call.arguments) for call in found] == expected
    reader, events = CallReader(), []
    for start in range(0, len(text), size):
        events += reader.read(text[start : start + size])
    assert [event.name for event in events if isinstance(event, Began)] == [n for n, _ in expected]
    for number, (_, arguments) in enumerate(expected):
        parts = (e for e in events if isinstance(e, Continued) and e.index == number)
        assert "".join(part.arguments for part in parts) == arguments


@given(st.text())
def test_a_text_that_is_no_call_stays_a_text(text: str) -> None:
    if not text.startswith("<tool_call>"):
        assert split(text) == (text, [])
