"""Choosing, stopping and streaming: what an answer is made of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolstack.errors import GenerationError
from smolstack.generation.detokenizer import Detokenizer
from smolstack.generation.sampling import Sampler, SamplingParams, penalize, warp
from smolstack.generation.stopping import RepetitionRule, Stopping, find_stop, held_back

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def kept(sampling: SamplingParams) -> list[int]:
    return torch.isfinite(warp(LOGITS, sampling)).nonzero().flatten().tolist()


def test_greedy_takes_the_likeliest_token() -> None:
    assert Sampler(SamplingParams(), torch.tensor([0]))(LOGITS) == 1


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept(SamplingParams(temperature=1, top_k=2)) == [1, 2]
    assert kept(SamplingParams(temperature=1, top_k=99)) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_likeliest_that_reach_p() -> None:
    # Probabilities: 0.086, 0.636, 0.234, 0.032, 0.012.
    assert kept(SamplingParams(temperature=1, top_p=0.6)) == [1]
    assert kept(SamplingParams(temperature=1, top_p=0.8)) == [1, 2]
    assert kept(SamplingParams(temperature=1, top_p=0.9)) == [0, 1, 2]
    assert kept(SamplingParams(temperature=1, top_p=1e-9)) == [1]


def test_min_p_keeps_tokens_near_the_likeliest() -> None:
    assert kept(SamplingParams(temperature=1, min_p=0.3)) == [1, 2]
    assert kept(SamplingParams(temperature=1, min_p=1.0)) == [1]


def test_the_penalty_makes_seen_tokens_less_likely_of_either_sign() -> None:
    found = penalize(LOGITS, torch.tensor([1, 4]), 2.0)
    assert found.tolist() == [1.0, 1.5, 2.0, 0.0, -2.0]


def test_the_penalty_counts_prompt_and_answer() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=4.0), torch.tensor([1]))
    assert [sampler(LOGITS) for _ in range(3)] == [2, 0, 1]


def test_a_seed_repeats_an_answer_and_temperature_spreads_it() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), torch.tensor([0]))
        return [sampler(LOGITS) for _ in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(7))) > 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_options_without_meaning_are_refused(option: str, value: float) -> None:
    with pytest.raises(GenerationError, match=f"{option} is {value}, expected"):
        SamplingParams(**{option: value})  # type: ignore[arg-type]


def test_stopping_needs_room_and_words() -> None:
    with pytest.raises(GenerationError, match="max_new_tokens is 0"):
        Stopping(max_new_tokens=0)
    with pytest.raises(GenerationError, match="a stop string is empty"):
        Stopping(max_new_tokens=1, stop=("",))
    with pytest.raises(GenerationError, match="a repetition rule"):
        RepetitionRule(times=1)


def test_an_answer_that_goes_round_in_circles_is_recognized() -> None:
    rule = RepetitionRule(longest=10, times=3, tokens=12)
    assert rule.matches([9, 8] + [1, 2, 3] * 4)
    assert rule.matches([5] * 12)
    assert not rule.matches([5] * 11), "too few tokens to be sure"
    assert not rule.matches([1, 2, 3] * 3 + [4])
    assert not rule.matches(list(range(100)))
    assert not rule.matches(([0] * 4 + [1]) * 2 + [0] * 4), "rows of a table of zeros"


def test_the_first_stop_string_counts() -> None:
    assert find_stop("one two three", ["three", "two"]) == 4
    assert find_stop("one", ["two"]) is None
    assert held_back("ab\nUs", ["\nUser:", "x"]) == 3
    assert held_back("ab", ["\nUser:"]) == 0


def bytes_as_tokens(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text())
def test_pieces_are_whole_characters_and_add_up_to_the_text(text: str) -> None:
    stream = Detokenizer(bytes_as_tokens)
    pieces = [stream.push(byte) for byte in text.encode()]
    pieces.append(stream.finish())
    assert "".join(pieces) == text == stream.text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_character_of_four_bytes_comes_at_once() -> None:
    stream = Detokenizer(bytes_as_tokens)
    assert [stream.push(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


def test_bytes_that_never_make_a_character_do_not_hold_up_the_rest() -> None:
    stream = Detokenizer(bytes_as_tokens)
    pieces = [stream.push(byte) for byte in [226, 130, *list(b"A")]]
    assert "".join(pieces).endswith("A")
    stream = Detokenizer(bytes_as_tokens)
    stream.push(0xE2)
    assert stream.finish() == "\ufffd"


@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stop=st.text(alphabet="ab\n", min_size=1, max_size=4),
)
def test_no_part_of_a_stop_string_is_ever_shown(text: str, stop: str) -> None:
    stream = Detokenizer(bytes_as_tokens, [stop])
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        assert text.split(stop, maxsplit=1)[0].startswith(shown)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == text.split(stop, maxsplit=1)[0]
    assert stream.stopped == (stop in text)
