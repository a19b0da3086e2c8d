"""A value of another type is refused before any work is done, and None stands for the default."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import smolstack
from smolstack.errors import GenerationError, ImageError
from smolstack.generation.options import AnswerOptions, read_options
from smolstack.processor.inputs import ImageOptions

NAMES = sorted({*AnswerOptions.__annotations__, *ImageOptions.__annotations__})
WORDS = {
    "stop": ("stop string",),
    "bad_words": ("bad word",),
    "choices": ("a choice is",),
}  # other words for an option
VALUES = [object(), "abc", 5, 2.5, [1], [None], {"a": 1}, b"x", True, float("nan"), 2**70, -1]


@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_taken_or_refused_by_name(name: str) -> None:
    for value in VALUES:
        options: Any = {name: value}
        try:
            read_options(options, (2,))
        except GenerationError as refused:
            said = str(refused)
            assert any(word in said for word in (name, *WORDS.get(name, ()))), said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected a whole number"),
        ({"temperature": "0.5"}, "temperature is '0.5', expected a number"),
        ({"seed": "abc"}, "seed is 'abc', expected a whole number"),
        ({"seed": 2**70}, f"seed is {2**70}, expected -2**63 to 2**64 - 1"),
        ({"logit_bias": [1]}, "logit_bias is [1], expected a mapping from token ids to numbers"),
        ({"logit_bias": {52.9: -1}}, "logit_bias is {52.9: -1}, expected a mapping from token ids"),
        ({"logit_bias": {"5": 1, "05": -1}}, "logit_bias is {'5': 1, '05': -1}, expected a mapp"),
        ({"logit_bias": {5: 10**400}}, "logit_bias is {5: 1000"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"stop": 5}, "stop is 5, expected text or a list of texts"),
        ({"stop_token_ids": "abc"}, "stop_token_ids is 'abc', expected a token id or a list of"),
        ({"stop_on_repetition": 4}, "stop_on_repetition is 4, expected True, False or a Repetit"),
        ({"keep_special_tokens": "no"}, "keep_special_tokens is 'no', expected True or False"),
        ({"split": "no"}, "split is 'no', expected True or False"),
        ({"password": 5}, "password is 5, expected text"),
    ],
    ids=str,
)
def test_a_value_of_another_type_says_what_was_expected(options: Any, expected: str) -> None:
    with pytest.raises(GenerationError) as error:
        read_options(options, (2,))
    assert str(error.value).startswith(expected)


def test_none_is_the_default() -> None:
    none: Any = dict.fromkeys(NAMES)
    assert read_options(none, (2,)) == read_options({}, (2,))


def test_numpy_s_numbers_are_numbers() -> None:
    options: Any = {
        "max_new_tokens": np.int64(7),
        "temperature": np.float32(0.5),
        "stop_token_ids": np.int32(3),
        "seed": np.int64(4),
        "top_p": Fraction(1, 2),
        "keep_special_tokens": np.True_,
    }
    read = read_options(options, (2,))
    assert (read.stopping.max_new_tokens, read.stopping.eos_token_ids) == (7, (2, 3))
    assert (read.sampling.temperature, read.sampling.top_p) == (0.5, 0.5)
    assert type(read.sampling.seed) is int
    assert read.keep_special_tokens is True


@pytest.mark.parametrize("options", [{"split": "no"}, {"upscale": 1}, {"max_image_tokens": 9.5}])
def test_planning_refuses_them_too(options: Any, tiny_vlm: smolstack.VLM) -> None:
    with pytest.raises(ImageError, match=next(iter(options))):
        tiny_vlm.plan((64, 64), **options)
    with pytest.raises(ImageError, match="password is 5, expected text"):
        tiny_vlm.plan("report.pdf", password=5)  # type: ignore[arg-type]
