"""The warpers keep the tokens that transformers' logits processors keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from smolstack.checkpoint.new import random_model
from smolstack.family import PRESETS
from smolstack.generation.sampling import Sampler, SamplingParams, penalize, warp
from smolstack.interop.miniature import miniature
from smolstack.interop.reference import share_model

SETTINGS = [
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=7),
    SamplingParams(temperature=1.0, top_k=500),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=0.05),
    SamplingParams(temperature=1.0, top_p=0.999),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=0.3, top_k=20, top_p=0.8, min_p=0.1),
    SamplingParams(temperature=1.7, top_k=50, top_p=0.95, min_p=0.02),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=2.5),
]


def _logits(kind: str, seed: int) -> Tensor:
    logits = 4 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        return logits.round()
    if kind == "flat":
        return torch.zeros(200)
    if kind == "peaked":
        logits[seed] += 60
    return logits


def _theirs(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The warpers in the order in which transformers' generate applies them."""
    chain: Any = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    warped: Tensor = chain(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    return warped


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["smooth", "ties", "peaked", "flat"])
def test_the_same_tokens_stay_with_the_same_scores(sampling: SamplingParams, kind: str) -> None:
    for seed in range(10):
        logits = _logits(kind, seed)
        ours, theirs = warp(logits, sampling), _theirs(logits, sampling)
        assert torch.equal(ours.isneginf(), theirs.isneginf())
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.3, 2.0])
@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_repeated_tokens_are_penalized_alike(penalty: float, kind: str) -> None:
    for seed in range(10):
        logits = _logits(kind, seed)
        ids = torch.randint(0, 200, (1, 50), generator=torch.Generator().manual_seed(seed))
        processor: Any = RepetitionPenaltyLogitsProcessor(penalty)
        theirs = processor(ids, logits[None])[0]
        assert torch.equal(penalize(logits, torch.unique(ids), penalty), theirs)


def test_the_order_is_that_of_generate() -> None:
    settings: Any = GenerationConfig
    config = settings(
        do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2
    )
    model = share_model(random_model(miniature(PRESETS["smolvlm-256m"], layers=1).config))
    chain = model._get_logits_processor(config, input_ids_seq_length=3)
    names = [type(step).__name__ for step in chain]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


def test_greedy_takes_the_first_of_equal_tokens_as_transformers_does() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0])
    assert Sampler(SamplingParams(), torch.tensor([0]))(logits) == int(torch.argmax(logits)) == 1


@pytest.mark.parametrize("temperature", [1e-4, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([0.5, 900.0, -3.0, 899.0])
    sampler = Sampler(
        SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1), torch.tensor([0])
    )
    assert [sampler(logits) for _ in range(5)] == [1] * 5
