"""Function calling: calls that are valid by construction, whole, streamed, and in the history."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from tests.serve.conftest import Process
from tests.serve.test_chat import MODEL, asking
from tests.serve.test_refusals import message, post

from smolstack.errors import GenerationError
from smolstack.generation.grammar import Grammars
from smolstack.generation.lark import Lark, calls_grammar, read_grammar
from smolstack.processor.prompt import ChatTemplate
from smolstack.serve.tool_calls import CallReader

PARAMETERS = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["number"],
}
NOTE: Any = {"type": "function", "function": {"name": "note", "parameters": PARAMETERS}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
TOOLS = [NOTE, NOW]
NAMED: Any = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
def test_a_call_that_was_asked_for_is_made(client: openai.OpenAI, number: str, choice: Any) -> None:
    made = client.chat.completions.create(
        model=MODEL,
        messages=asking(number),
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
    )
    assert made.choices[0].finish_reason == "tool_calls"
    assert made.choices[0].message.content is None
    [call] = made.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if choice == NAMED or call.function.name == "now":
        assert (call.function.name, arguments) == ("now", {})
    else:
        assert set(arguments) == {"number"}
        assert 0 <= arguments["number"] <= 9999


def test_no_call_is_the_same_as_no_tools(client: openai.OpenAI, number: str, says: str) -> None:
    for fields in ({"tools": TOOLS, "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}):
        made = client.chat.completions.create(model=MODEL, messages=asking(number), **fields)
        assert made.choices[0].message.content == says
        assert made.choices[0].message.tool_calls is None
        assert made.choices[0].finish_reason == "stop"


def test_a_streamed_call_is_the_whole_one(client: openai.OpenAI, number: str) -> None:
    asked: Any = {
        "model": MODEL, "messages": asking(number), "tools": [NOTE], "tool_choice": "required",
    }  # fmt: skip
    [whole] = client.chat.completions.create(**asked).choices[0].message.tool_calls
    chunks = list(client.chat.completions.create(**asked, stream=True))
    parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [part.index for part in parts] == [0] * len(parts)
    assert (parts[0].function.name, parts[0].type) == ("note", "function")
    assert parts[0].id.startswith("call_")
    pieces = [part.function.arguments for part in parts]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_call_that_is_cut_off_is_none(client: openai.OpenAI, number: str) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=asking(number), tools=TOOLS, tool_choice="required", max_tokens=20
    )
    assert made.choices[0].finish_reason == "length"
    assert made.choices[0].message.tool_calls is None
    assert made.choices[0].message.content is None


def test_calls_and_results_stand_in_the_history(client: openai.OpenAI, number: str) -> None:
    asked: Any = {"model": MODEL, "messages": asking(number), "tools": [NOTE]}
    said = client.chat.completions.create(**asked, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "noted"}
    chat = [*asked["messages"], said, result]
    long = client.chat.completions.create(**{**asked, "messages": chat}, max_tokens=4)
    without = client.chat.completions.create(
        model=MODEL, messages=[*asked["messages"], {"role": "user", "content": "noted"}],
        max_tokens=4,
    )  # fmt: skip
    assert long.usage is not None
    assert without.usage is not None
    assert long.usage.prompt_tokens > without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": "required"}, "tool_choice requires a call"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nwo"}}},
         "tool_choice names 'nwo', but the functions are note, now"),
        ({"tools": [NOW, NOW]}, "two tools have the same name"),
        ({"tools": TOOLS, "stop": ["x"]}, "found stop and tools"),
        ({"tools": TOOLS, "regex": "a"}, "found regex and tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
         "tools.0.function.name: String should match pattern"),
        ({"tools": [{"type": "function", "function": {"name": "a", "prameters": {}}}]},
         "tools.0.function.prameters: no such field; the nearest known field is parameters"),
        ({"tools": [{"type": "function", "function": {
            "name": "a", "parameters": {"type": "array"}}}]},
         "tools.0.function.parameters has the type 'array', expected object"),
        ({"functions": [{"name": "a"}]},
         "functions is the deprecated form of tool calling; send tools"),
        ({"function_call": {"name": "a"}},
         "function_call is the deprecated form of tool calling; send tool_choice and tools"),
        ({"messages": [{"role": "user", "content": "?", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}]}]},
         "tool_calls in a message of role user, expected assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{"}}]}]},
         "the arguments of a call are not valid JSON"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_cannot_be_called_is_refused(
    server: Process, fields: dict[str, Any], expected: str
) -> None:
    asked = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1, **fields}
    response = post(server, asked)
    assert response.status_code == 400, response.text
    assert expected in message(response)


def test_calls_are_found_however_an_answer_is_cut_into_pieces() -> None:
    text = (
        '<tool_call>{"name": "a", "arguments": {"s": "}\\"{", "l": [{"x": 1}]}}</tool_call>\n'
        '<tool_call> {"name": "b", "arguments": {}} </tool_call>'
    )
    for size in (1, 2, 3, 7, 200):
        reader, deltas = CallReader(), list[Any]()
        for start in range(0, len(text), size):
            deltas += reader.push(text[start : start + size])
        assert reader.finish() == []
        assert [(call.name, call.arguments, call.complete) for call in reader.calls] == [
            ("a", '{"s": "}\\"{", "l": [{"x": 1}]}', True),
            ("b", "{}", True),
        ]
        told = ["", ""]
        for delta in deltas:
            [part] = delta["tool_calls"]
            told[part["index"]] += part["function"]["arguments"]
        assert told == [call.arguments for call in reader.calls]


def test_text_that_only_begins_like_a_call_is_text() -> None:
    reader = CallReader()
    deltas = [*reader.push("<tool"), *reader.push("box> it is"), *reader.finish()]
    assert "".join(delta["content"] for delta in deltas) == "<toolbox> it is"
    reader = CallReader()
    assert [*reader.push("<tool_"), *reader.finish()] == [{"content": "<tool_"}]


def test_an_answer_may_be_a_call_or_text_where_the_choice_is_free(reader: Any) -> None:
    form = calls_grammar({"now": '{"type": "object", "properties": {}}'}, several=False, free=True)
    ends = reader.eos_token_ids
    grammars = Grammars(reader.processor.tokenizer, reader.config.text.vocab_size, ends, " ")
    encode = reader.processor.tokenizer.encode

    def follow(text: str) -> Any:
        from smolstack.generation.triggered_constraint import TriggeredConstraint

        made = TriggeredConstraint(
            grammars.matcher(grammars.compile(form)),
            grammars.vocab_size,
            form.trigger,
            reader.processor.tokenizer.decode,
        )
        for token in encode(text, special=False):
            made.take(token)
        return made

    free = follow(" 4711")
    assert free.free
    assert bool(free.allowed().all())
    bound = follow(' <tool_call>{"name": "now", "arguments": ')
    assert bound.bound
    assert set(bound.allowed().nonzero()[:, 0].tolist()) <= {
        token for token in range(grammars.vocab_size)
        if reader.processor.tokenizer.decode([token]).startswith("{")
    }  # fmt: skip


def test_a_template_that_knows_tools_is_given_them() -> None:
    source = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ bos_token }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.knows_tools
    assert template.render([], tools=[NOTE, NOW]) == "[note][now]<s>"
    assert template.render([]) == "<s>"
    assert not ChatTemplate("{{ messages[0].role }}", {}).knows_tools


def test_a_grammar_of_lark_or_of_gbnf(client: openai.OpenAI, reader: Any, number: str) -> None:
    forms = ['start: "No. " NUMBER\nNUMBER: /[0-9]{4}/', 'root ::= "No. " [0-9] [0-9] [0-9] [0-9]']
    for name in ("grammar", "guided_grammar"):
        for form in forms:
            made = client.chat.completions.create(
                model=MODEL, messages=asking(number), extra_body={name: form}
            )
            text = made.choices[0].message.content or ""
            assert text.startswith("No. "), text
            assert len(text) == 8, text
            assert text[4:].isdigit(), text


def test_a_grammar_that_is_none() -> None:
    for wrong, expected in ((3, "grammar is 3"), (" ", "expected Lark"), ("a: b", "no rule start")):
        with pytest.raises(GenerationError, match=expected):
            read_grammar(wrong)


def test_a_rule_named_start_may_be_used_again_after_a_lead() -> None:
    form = Lark('start: "start" start? /start/ | "a" // start\n')
    assert form.after(" ") == (
        'start: " " the_answer\nthe_answer: "start" the_answer? /start/ | "a" // start\n'
    )
    assert form.after("") == form.grammar
