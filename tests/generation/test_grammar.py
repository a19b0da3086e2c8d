"""Answers of a given form: valid or said to be cut off, and choices with exact probabilities."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import smolstack
from smolstack.errors import ContextLengthError, GenerationError, SmolstackError
from smolstack.generation.constraint import POINTS_IN_A_ROW
from smolstack.generation.structured_output import Regex, closed

IMAGE = Path(__file__).parent.parent.parent / "examples" / "number.png"
QUESTION = "What does it say?"


class Reading(pydantic.BaseModel):
    kind: Literal["number", "word"]
    digits: str = pydantic.Field(pattern=r"^[0-9]{1,6}$")


@pytest.fixture(scope="module")
def reader() -> smolstack.VLM:
    """One token per byte."""
    return smolstack.load()


@pytest.fixture(params=["reader", "tiny"])
def vlm(request: pytest.FixtureRequest) -> smolstack.VLM:
    """Both kinds of vocabulary: bytes, and byte-level BPE with merged tokens."""
    name = {"reader": "reader", "tiny": "tiny_vlm"}[request.param]
    found: smolstack.VLM = request.getfixturevalue(name)
    return found


def test_a_pydantic_model_comes_back_as_an_object(reader: smolstack.VLM) -> None:
    answer = reader.ask(IMAGE, QUESTION, schema=Reading)
    assert answer.finish_reason == "stop"
    assert isinstance(answer.parsed, Reading)
    assert answer.parsed == Reading.model_validate_json(answer.text)


def test_a_pydantic_model_has_its_own_fields_alone() -> None:
    inner = {"type": "object", "properties": {"properties": {"const": {"properties": {}}}}}
    found = closed({"$defs": {"inner": inner}, "properties": {"a": {"enum": [1]}}})
    assert found == {
        "$defs": {"inner": {**inner, "additionalProperties": False}},
        "properties": {"a": {"enum": [1]}},
        "additionalProperties": False,
    }


def test_a_json_schema_comes_back_as_plain_data(vlm: smolstack.VLM) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2, 30]}, "b": {"type": "array", "maxItems": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    schema["properties"]["b"]["items"] = {"type": "boolean"}  # type: ignore[index]
    answer = vlm.ask(text=QUESTION, schema=schema)
    assert answer.parsed == json.loads(answer.text)
    assert answer.parsed["a"] in (1, 2, 30)
    assert all(item in (True, False) for item in answer.parsed["b"])


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pattern=st.sampled_from(
        [r"[0-9]{3}-[0-9]{2}", r"(yes|no|maybe)\.", r" +x", r"a/b\"c", r"\n?[äöü]{2}", r"🙂{1,2}"]
    ),
    seed=st.integers(0, 1000),
)
def test_a_regex_matches_the_whole_answer(vlm: smolstack.VLM, pattern: str, seed: int) -> None:
    stream = vlm.stream(text=QUESTION, regex=pattern, temperature=1.5, seed=seed, max_new_tokens=40)
    text = "".join(stream)
    answer = stream.answer
    assert text == answer.text
    if answer.finish_reason == "stop":
        assert re.fullmatch(pattern, answer.text)
    else:
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("limit", range(1, 12))
def test_what_does_not_fit_is_said_to_be_cut_off(vlm: smolstack.VLM, limit: int) -> None:
    schema = {"const": {"a long key": [1, 2, 3]}}
    answer = vlm.ask(text=QUESTION, schema=schema, max_new_tokens=limit)
    if answer.finish_reason == "stop":
        assert answer.parsed == schema["const"]
    else:
        assert (answer.finish_reason, answer.parsed) == ("length", None)


def test_every_row_of_a_batch_keeps_to_the_form(tiny_vlm: smolstack.VLM) -> None:
    questions = ["One?", "And this one, which is longer?", "Three"]
    together = tiny_vlm.ask_many(questions, regex="[a-z]{2,8}!", temperature=1.0, seed=1)
    alone = [
        tiny_vlm.ask(text=text, regex="[a-z]{2,8}!", temperature=1.0, seed=1) for text in questions
    ]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_choices_are_exactly_as_likely_as_the_model_has_them(vlm: smolstack.VLM) -> None:
    """Against one plain forward pass over prompt and choice, per choice."""
    texts = ["4711", "47", "no", "something much longer"]
    answer = vlm.ask(text=QUESTION, choices=texts)
    prompt = vlm.processor.prepare(([], QUESTION))
    for text in texts:
        lead = vlm.processor.answer_lead
        ids = [*vlm.processor.tokenizer.encode(prompt.text + lead + text), vlm.eos_token_ids[0]]
        batch = vlm.processor.batch([prompt])
        whole = torch.tensor([ids])
        with torch.inference_mode():
            scores = vlm.model(
                type(batch)(whole, torch.ones_like(whole, dtype=torch.bool), batch.tiles, (), (0,))
            )[0].log_softmax(dim=-1)
        start = len(prompt.token_ids)
        expected = sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert answer.choice_logprobs is not None
        assert answer.choice_logprobs[text] == pytest.approx(expected, abs=2e-4)
    assert answer.probabilities is not None
    assert math.fsum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.text == max(answer.probabilities, key=answer.probabilities.__getitem__)


def test_many_and_long_choices_are_read_in_pieces(reader: smolstack.VLM) -> None:
    texts = [str(number) * 4 for number in range(200)] + ["0123456789" * 55]
    many = reader.ask(IMAGE, QUESTION, choices=texts).choice_logprobs
    assert many is not None
    for some in (texts[:3], texts[-2:]):
        few = reader.ask(IMAGE, QUESTION, choices=some).choice_logprobs
        assert few == pytest.approx({text: many[text] for text in some}, rel=1e-4)


def test_choices_are_drawn_as_often_as_they_are_likely(reader: smolstack.VLM) -> None:
    options: dict[str, Any] = {"choices": ["4711", "4712", "4719"], "temperature": 3.0}
    found = [reader.ask(IMAGE, QUESTION, seed=seed, **options).text for seed in range(12)]
    again = [reader.ask(IMAGE, QUESTION, seed=seed, **options).text for seed in range(12)]
    assert found == again
    assert set(found) <= {"4711", "4712", "4719"}


def test_choices_of_a_batch_are_those_of_each_alone(tiny_vlm: smolstack.VLM) -> None:
    together = tiny_vlm.ask_many(["Red?", "What colour is it?"], choices=["red", "blue"])
    for text, answer in zip(["Red?", "What colour is it?"], together, strict=True):
        alone = tiny_vlm.ask(text=text, choices=["red", "blue"])
        assert answer.text == alone.text
        assert answer.probabilities == pytest.approx(alone.probabilities)


def test_an_answer_after_choices_is_as_before(reader: smolstack.VLM) -> None:
    before = reader.ask(IMAGE, QUESTION)
    reader.ask(IMAGE, QUESTION, choices=["1", "2"])
    assert reader.ask(IMAGE, QUESTION).token_ids == before.token_ids


def test_logprobs_are_those_of_the_model_whatever_the_form(reader: smolstack.VLM) -> None:
    free = reader.ask(IMAGE, QUESTION, logprobs=2)
    assert free.logprobs is not None
    assert [one.token_id for one in free.logprobs] == list(free.token_ids)
    assert all(one.top[0] == (one.token_id, one.logprob) for one in free.logprobs)
    formed = reader.ask(IMAGE, QUESTION, logprobs=1, regex="x")
    assert formed.logprobs is not None
    assert formed.logprobs[-1].logprob < formed.logprobs[-1].top[0][1]


def test_a_reader_that_points_does_so_within_a_form_but_its_text_keeps_to_it(
    reader: smolstack.VLM,
) -> None:
    pointing = reader.processor.pointing
    answer = reader.ask(IMAGE, QUESTION, regex="[0-9]{4}")
    assert answer.text == "4711"
    assert sum(token in pointing for token in answer.token_ids) >= 4
    kept = reader.ask(IMAGE, QUESTION, regex="[0-9]{4}", keep_special_tokens=True)
    assert re.match("[0-9]{4}", kept.text)
    assert not any(token in pointing for token in kept.token_ids)


def test_a_reader_that_only_points_is_made_to_go_on(reader: smolstack.VLM) -> None:
    grammars = reader._inline.core.maker.grammars(reader.eos_token_ids)
    constraint = grammars.constraint(grammars.compile(Regex("[ab]")))
    constraint.take(ord(" "))
    point = reader.processor.pointing[0]
    for _ in range(POINTS_IN_A_ROW):
        assert bool(constraint.allowed()[point])
        constraint.take(point)
    assert constraint.allowed().nonzero().flatten().tolist() == [ord("a"), ord("b")]


def test_a_grammar_that_grows_too_complex_within_an_answer_says_so(reader: smolstack.VLM) -> None:
    grammars = reader._inline.core.maker.grammars(reader.eos_token_ids)
    constraint = grammars.constraint(grammars.compile(Regex(r"(\w{1,20}[ ,.]?){1,500}"))).begin()
    constraint.take(ord(" "))

    def write(text: str) -> None:
        for character in text:
            constraint.allowed()
            constraint.take(ord(character))

    with pytest.raises(GenerationError, match="became too complex to continue the answer"):
        write("rjn2UzwlZvfOyEXE9TF 96cufpaNvqU4,5l cxcSb5LPRFr87azw " * 9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schema": {"type": "foo"}}, "schema is not supported: Invalid type: foo"),
        ({"schema": {"$ref": "#/nowhere"}}, "schema is not supported: Pointer"),
        (
            {"schema": {"type": "string", "pattern": "("}},
            r"the schema is not supported: pattern '\(': unclosed group",
        ),
        (
            {
                "schema": {
                    "properties": {
                        "a": {"pattern": "^a$"},
                        "b": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(?=a)b"}]},
                    }
                }
            },
            r"schema is not supported: properties.b.anyOf.1.pattern '\(\?=a\)b': look-around",
        ),
        (
            {"schema": {"patternProperties": {"a^b": {}}}},
            r"schema is not supported: patternProperties.a\^b 'a\^b': lookarounds",
        ),
        ({"schema": {"a": {1, 2}}}, "schema is not valid JSON"),
        ({"schema": "string"}, "schema is a str, expected a JSON Schema"),
        ({"regex": "("}, r"regex '\(' is not supported: unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": 3}, "regex is a int"),
        ({"choices": []}, "choices is"),
        ({"choices": "yes"}, "choices is 'yes', expected a list"),
        ({"choices": ["a", " "]}, "a choice is ' '"),
        ({"choices": ["a", "a"]}, "two choices are equal"),
        ({"schema": {}, "regex": "a"}, "found schema and regex"),
        ({"regex": "a+", "stop": "b"}, "stop strings and regex"),
        ({"logprobs": 21}, "logprobs is 21, expected 0 to 20"),
    ],
    ids=str,
)
def test_a_form_without_meaning_is_refused_before_any_work(
    reader: smolstack.VLM, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(GenerationError, match=expected):
        reader.stream(IMAGE, QUESTION, **options)


def test_a_choice_that_does_not_fit_is_refused(tiny_vlm: smolstack.VLM) -> None:
    with pytest.raises(ContextLengthError, match=r"the choice 'long .* has \d+ tokens"):
        tiny_vlm.stream(text=QUESTION, choices=["short", "long " * 400])


def test_a_model_whose_own_validators_refuse_gives_no_object(reader: smolstack.VLM) -> None:
    class Never(pydantic.BaseModel):
        a: Literal[1]

        @pydantic.field_validator("a")
        @classmethod
        def refuse(cls, _: int) -> int:
            raise ValueError("never")

    answer = reader.ask(text=QUESTION, schema=Never)
    assert (answer.text, answer.parsed) == ('{"a": 1}', None)


def test_llguidance_that_is_not_installed_is_said(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    vlm = smolstack.load(tiny_folder)
    with pytest.raises(SmolstackError, match=r"pip install 'smolstack\[structured\]'"):
        vlm.ask(text="?", regex="a")
    assert vlm.ask(text="?", choices=["a", "b"]).text in ("a", "b")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_form_holds_in_every_precision(tiny_folder: Path, dtype: str) -> None:
    vlm = smolstack.load(tiny_folder, dtype=dtype)
    number = vlm.ask(text="How many?", regex="[0-9]{3}", max_new_tokens=16).text
    assert re.fullmatch("[0-9]{3}", number)
    chosen = vlm.ask(text="Which?", choices=["red", "green", "blue"])
    assert chosen.text in ("red", "green", "blue")


def test_a_choice_of_special_tokens_is_refused(tiny_vlm: smolstack.VLM) -> None:
    with pytest.raises(GenerationError, match="special tokens"):
        tiny_vlm.ask(text="Which?", choices=["yes", "<image>"])
