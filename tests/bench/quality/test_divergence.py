"""Divergence and windows: literal numbers, and every word read once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import smolstack
from smolstack.bench.quality.divergence import Divergence
from smolstack.bench.quality.passages import TEST_TEXT, read_text, windows
from smolstack.errors import CheckpointError, DataError


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_a_divergence_is_the_mean_over_tokens_in_nats() -> None:
    told = Divergence()
    expected = logits((0.5, 0.25, 0.25), (0.2, 0.2, 0.6))
    found = logits((0.25, 0.5, 0.25), (0.2, 0.2, 0.6))
    told.add(expected, found, torch.tensor([1, 2]))
    # 0.5 · ln(0.5 / 0.25) + 0.25 · ln(0.25 / 0.5) = 0.25 · ln 2, and nothing for the second token.
    assert told.mean == pytest.approx(0.25 * math.log(2) / 2, abs=1e-6)
    assert told.agreement == 0.5
    assert told.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.6)) / 2))
    # A model's divergence from itself is none at all, and a constant added to logits no change.
    same = Divergence()
    same.add(expected, expected + 3, torch.tensor([0, 0]))
    assert same.mean == pytest.approx(0, abs=1e-7)
    assert same.agreement == 1


def test_what_cannot_be_compared_is_refused() -> None:
    told = Divergence()
    with pytest.raises(CheckpointError, match=r"shape \(1, 2\), expected \(1, 3\)"):
        told.add(torch.zeros(1, 3), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(CheckpointError, match="not finite"):
        told.add(torch.zeros(1, 3), torch.full((1, 3), torch.nan), torch.tensor([0]))


def test_windows_hold_every_word_once_and_are_of_about_one_length(
    tiny_vlm: smolstack.VLM,
) -> None:
    text = read_text(TEST_TEXT)[:1500]
    batches = windows(tiny_vlm.processor, text, 200)
    sizes = [batch.token_ids.shape[1] for batch in batches]
    assert len(sizes) > 3
    assert max(sizes) <= 200
    assert min(sizes) > 120
    said = [
        tiny_vlm.processor.tokenizer.decode(batch.token_ids[0].tolist(), skip_special=False)
        for batch in batches
    ]
    words = [
        word
        for part in said
        for word in part.partition("User: ")[2].partition("<end_of_utterance>")[0].split()
    ]
    assert "".join(words) == "".join(text.split())


def test_a_text_without_spaces_is_cut_as_well(tiny_vlm: smolstack.VLM) -> None:
    batches = windows(tiny_vlm.processor, "4711" * 300, 200)
    assert all(batch.token_ids.shape[1] <= 200 for batch in batches)
    assert len(batches) >= 6


def test_the_text_that_comes_along_is_long_enough() -> None:
    assert 800 <= len(read_text(TEST_TEXT).split()) <= 1500


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path, tiny_vlm: smolstack.VLM) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt contains no text"):
        read_text(empty)
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read as text"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="no room for text"):
        windows(tiny_vlm.processor, "Hello.", 10)
