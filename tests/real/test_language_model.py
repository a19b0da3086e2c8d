"""A precision keeps a trained language model: distributions, answers, saved folders, backends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.real.conftest import Loaded

import smolstack
from smolstack.bench.quality.divergence import Divergence
from smolstack.bench.quality.passages import TEST_TEXT, read_text, windows

TOKENS = 256  # of a window of the test text
QUESTIONS = ("Name three fruits.", "What is the capital of France?", "Say hello in Spanish.")


def divergence(reference: smolstack.VLM, other: smolstack.VLM) -> Divergence:
    """How far the second model's next-token distributions are from the first's, on plain text."""
    found = Divergence()
    for batch in windows(reference.processor, read_text(TEST_TEXT), TOKENS)[:2]:
        with torch.inference_mode():
            expected, scores = (vlm.model(batch)[0, :-1].float() for vlm in (reference, other))
        found.add(expected, scores, batch.token_ids[0, 1:])
    return found


@pytest.mark.parametrize(
    ("dtype", "most", "agreement"),
    [("bfloat16", 0.003, 0.97), ("int8", 0.005, 0.93), ("int4", 0.25, 0.75)],
)
def test_a_precision_keeps_the_distributions_of_a_real_language_model(
    dtype: str, most: float, agreement: float, in_dtype: Loaded
) -> None:
    found = divergence(in_dtype("float32"), in_dtype(dtype))
    assert found.tokens > 300
    assert found.mean <= most
    assert found.agreement >= agreement


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_every_precision_answers_a_question(dtype: str, in_dtype: Loaded) -> None:
    answer = in_dtype(dtype).ask(None, "What is the capital of France?", max_new_tokens=16)
    assert "Paris" in answer.text


def test_a_saved_int8_folder_is_the_model_that_was_saved(in_dtype: Loaded, tmp_path: Path) -> None:
    fast = in_dtype("int8")
    again = smolstack.load(fast.save(tmp_path / "int8"))
    found = divergence(fast, again)
    assert found.mean <= 1e-6
    assert found.agreement == 1


def test_questions_asked_together_are_answered_as_alone(in_dtype: Loaded) -> None:
    vlm = in_dtype("float32")
    alone = [vlm.ask(None, question, max_new_tokens=8).token_ids for question in QUESTIONS]
    together = vlm.ask_many([(None, question) for question in QUESTIONS], max_new_tokens=8)
    assert [answer.token_ids for answer in together] == alone
