"""What is asked of single tokens, with literal logits and against a plain reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import smolstack
from smolstack.errors import GenerationError
from smolstack.generation.token_rules import TokenRules

LOGITS = torch.tensor([1.0, 2.0, 3.0, 4.0])


def after(taken: list[int], **rules: Any) -> list[float]:
    ends, eos = [3, *rules.get("stop_token_ids", ())], [3]
    return TokenRules(**rules).apply(LOGITS, taken, ends, eos).tolist()


def test_penalties_and_biases_are_sums() -> None:
    out = -float("inf")
    assert after([1, 1, 2]) == [1, 2, 3, 4]
    assert after([1, 1, 2], presence_penalty=0.5) == [1, 1.5, 2.5, 4]
    assert after([1, 1, 2], frequency_penalty=0.5) == [1, 1, 2.5, 4]
    assert after([1, 1], frequency_penalty=-2.0, presence_penalty=1.0) == [1, 5, 3, 4]
    assert after([], logit_bias=((0, 100.0), (2, -1.0))) == [101, 2, 2, 4]
    assert after([], min_tokens=1) == [1, 2, 3, out]
    assert after([0], min_tokens=1) == [1, 2, 3, 4]
    assert after([], min_tokens=2, stop_token_ids=(0,)) == [out, 2, 3, out]
    assert after([0] * 9, ignore_eos=True, stop_token_ids=(0,)) == [1, 2, 3, out]
    assert LOGITS.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5, expected"),
        ({"logit_bias": {3: 101}}, "logit_bias of 3 is 101.0"),
        ({"logit_bias": {"x": 1}}, "expected a mapping from token ids to numbers"),
        ({"logit_bias": {10**6: 1}}, "logit_bias contains token id 1000000"),
        ({"stop_token_ids": [-1]}, "stop_token_ids contains token id -1"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens is 9, expected at most max_new"),
        ({"min_tokens": 1, "regex": "a"}, "found min_tokens and regex"),
        ({"logit_bias": {1: 1}, "choices": ["a", "b"]}, "found logit_bias and choices"),
        ({"bad_words": [""]}, "a bad word is empty"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty is 1e-09, expected 0.01 to 100"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(options: Any, expected: str, reader: Any) -> None:
    with pytest.raises(GenerationError, match=expected.replace("(", r"\(")):
        reader.ask(text="?", **options)


@pytest.fixture(scope="module")
def reader() -> smolstack.VLM:
    return smolstack.load()


IMAGE, QUESTION = "examples/number.png", "What does it say?"


def test_answers_are_as_long_as_they_have_to_be(reader: smolstack.VLM) -> None:
    plain = reader.ask(IMAGE, QUESTION)
    count = plain.usage.completion_tokens
    longer = reader.ask(IMAGE, QUESTION, min_tokens=count + 3)
    assert longer.usage.completion_tokens >= count + 3
    assert longer.token_ids[: count - 1] == plain.token_ids[: count - 1]
    endless = reader.ask(IMAGE, QUESTION, ignore_eos=True, max_new_tokens=count + 3)
    assert endless.finish_reason == "length"
    assert not set(endless.token_ids) & set(reader.eos_token_ids)
    ended = reader.ask(IMAGE, QUESTION, stop_token_ids=[plain.token_ids[1]])
    assert ended.token_ids == plain.token_ids[:2]
    assert ended.finish_reason == "stop"


def test_a_bad_word_is_in_no_answer(reader: smolstack.VLM) -> None:
    assert reader.ask(IMAGE, QUESTION).text == "4711"
    assert "71" not in reader.ask(IMAGE, QUESTION, bad_words=["71"]).text
    assert reader.ask(IMAGE, QUESTION, bad_words=["zebra"]).text == "4711"


def test_penalties_are_those_of_a_plain_loop(reader: smolstack.VLM) -> None:
    options: Any = {
        "presence_penalty": 0.75, "frequency_penalty": 1.5, "logit_bias": {"1": 2.0},
        "max_new_tokens": 12,
    }  # fmt: skip
    found = reader.ask(IMAGE, QUESTION, **options).token_ids
    ids = list(reader.processor.prepare((IMAGE, QUESTION)).token_ids)
    taken: list[int] = []
    while len(taken) < 12 and not set(taken) & set(reader.eos_token_ids):
        batch = reader.processor([(IMAGE, QUESTION)])
        tokens = torch.tensor([[*ids, *taken]])
        batch = replace(batch, token_ids=tokens, attention_mask=torch.ones_like(tokens).bool())
        with torch.inference_mode():
            logits = reader.model(batch)[0, -1].float().tolist()
        for token in set(taken):
            logits[token] -= 0.75 + 1.5 * taken.count(token)
        logits[1] += 2.0
        taken.append(logits.index(max(logits)))
    assert list(found) == taken
