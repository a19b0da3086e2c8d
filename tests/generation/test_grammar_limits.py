"""No expression, schema or grammar keeps the machine busy or fills its memory."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest

from smolstack.errors import GenerationError
from smolstack.generation.grammar import Grammars
from smolstack.generation.grammar_limits import literals
from smolstack.generation.lark import Lark
from smolstack.generation.structured_output import Regex, Schema
from smolstack.vlm import VLM

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def grammars(tiny_vlm: VLM) -> Grammars:
    tokenizer = tiny_vlm.processor.tokenizer
    return Grammars(tokenizer, tiny_vlm.config.text.vocab_size, tiny_vlm.eos_token_ids, "")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("abc", 3),
        ("(abc){10}", 30),
        ("(?:a{10}){1,10}", 100),
        ("(a|bc){2,}", 6),
        (r"\x{41}{7}", 7),
        (r"\p{L}{500}", 500),
        (".{16}", 1),
        ("[a-z]{0,32}", 2),
        (r"[^\]]{16}x", 2),
        ("[a]{300}", 300),
        ("[[a]&&[a-z]]{300}", 300),
        ("[]a]{300}", 300),
        ("(?x: a {30} )", 30),
        ("(?x)(a # ) [\n a){300}", 600),
        ("a{1000}{1000}", 1_000_000),
        ("(?P<name>ab)+", 2),
        ("a++b?", 2),
        (r"\{9\}", 3),
        ("((((((((a{9}){99}){99}){99}){99}){99}){99}){99}){99}{99}{99}", 1e15),
    ],
)
def test_the_length_of_an_expression_is_known_before_it_is_compiled(
    pattern: str, expected: float
) -> None:
    assert literals(pattern) == pytest.approx(expected)


@pytest.mark.parametrize(
    "structure",
    [
        Regex("(a{1000}){1000}"),
        Regex("[a]{20000}"),
        Schema({"type": "string", "pattern": "^(a{1000}){1000}$"}),
        Schema({"items": {"anyOf": [{"pattern": "a{9999}"}, {"pattern": "b{9999}"}]}}),
        Lark("start: /(ab){100000}/"),
        Lark('start: "//" A\nA: /c{100000}/'),
    ],
    ids=repr,
)
def test_a_long_text_written_shortly_is_refused_at_once(grammars: Grammars, structure: Any) -> None:
    began = time.process_time()
    with pytest.raises(GenerationError, match="when its repetitions are written out, at most"):
        grammars.compile(structure)
    assert time.process_time() - began < 0.5


_PRIMES = {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        (Schema(_PRIMES), "schema"),
        (Lark("start: A\nA: /(.{97})*x/ & /(.{89})*x/ & /(.{83})*x/"), "grammar"),
        (Lark(f"start: x\nx: %json {json.dumps(_PRIMES)}", name="tools"), "tools"),
    ],
    ids=repr,
)
def test_an_intersection_that_takes_too_long_is_refused(
    grammars: Grammars, structure: Any, name: str
) -> None:
    began = time.process_time()
    with pytest.raises(GenerationError, match=f"the {name} is too complex"):
        grammars.compile(structure)
    assert time.process_time() - began < 0.5, "it was not built in this process"
    with pytest.raises(GenerationError, match=f"the {name} is too complex"):
        grammars.compile(structure)  # it is remembered


@pytest.mark.parametrize(
    "structure",
    [
        Regex(r"(\w{1,20} ){1,50}[.!?]"),
        Regex("[^\n]{0,20000}"),
        Schema({"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$", "maxLength": 8}),
        Schema({"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1000}),
        Schema({"properties": {"pattern": {"type": "string"}}, "required": ["pattern"]}),
        Lark('start: "yes" | /no{1,3}/'),
    ],
    ids=repr,
)  # fmt: skip
def test_ordinary_forms_are_compiled(grammars: Grammars, structure: Any) -> None:
    grammars.constraint(grammars.compile(structure)).begin()


def test_a_check_that_cannot_be_started_is_not_taken_for_a_complex_schema(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "no-python")
    with pytest.raises(GenerationError, match=r"cannot be checked.*no-python cannot be started"):
        grammars.compile(Schema({"type": "string", "pattern": "^never seen before$"}))
