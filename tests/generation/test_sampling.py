"""How the next token is chosen."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from smolstack.generation.sampling import Sampler, SamplingParams, likeliest


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_the_likeliest_token_is_the_first_of_the_largest(scores: list[float]) -> None:
    assert likeliest(torch.tensor(scores)) == scores.index(max(scores))


def test_greedy_reads_logits_of_any_precision() -> None:
    choose = Sampler(SamplingParams(), torch.tensor([1]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.tensor([0.0, 3.0, -1.0, 3.0], dtype=dtype, requires_grad=True)
        assert choose(logits) == 1
        assert choose(logits, torch.tensor([True, False, True, True])) == 3
