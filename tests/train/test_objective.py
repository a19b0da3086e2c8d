"""The loss of a micro-batch, however it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import smolstack
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train import objective
from smolstack.train.batches import MicroBatch
from smolstack.train.loss_mask import IGNORED
from smolstack.train.objective import AnswerLoss, recomputed

LENGTHS = (11, 4, 7)


@pytest.fixture
def model(tiny_folder: Path) -> VisionLanguageModel:
    return smolstack.load(tiny_folder, dtype="float32").model.train()


def mixed() -> MicroBatch:
    """Three texts of different lengths; the loss covers all but their first two tokens."""
    ids = torch.zeros(3, max(LENGTHS), dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(3, 800, (length,), generator=generator)
        labels[row, 2:length] = ids[row, 2:length]
    return MicroBatch(ids, labels, (0, 0, 0), LENGTHS)


def loss_and_gradients(
    model: VisionLanguageModel, batch: MicroBatch
) -> tuple[float, dict[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("decoder", "head")))
        parameter.grad = None
    loss = AnswerLoss(model)(batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def test_rows_without_padding_have_the_losses_of_padded_rows(model: VisionLanguageModel) -> None:
    packed, gradients = loss_and_gradients(model, mixed())
    padded, expected = loss_and_gradients(model, replace(mixed(), lengths=()))
    assert packed == pytest.approx(padded, rel=1e-5)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-3)


def test_padding_tokens_never_reach_the_decoder(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    model.decoder.layers[0].register_forward_pre_hook(
        lambda _layer, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    AnswerLoss(model)(mixed())
    assert shapes == [(1, sum(LENGTHS))]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_that_are_computed_some_at_a_time_change_nothing(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    together, expected = loss_and_gradients(model, mixed())
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", 3)
    with recomputed(model, checkpointing):
        parted, gradients = loss_and_gradients(model, mixed())
    assert parted == pytest.approx(together, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert float(AnswerLoss(model)(mixed())) == pytest.approx(together, rel=1e-6)
