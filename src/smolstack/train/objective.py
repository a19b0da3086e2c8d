"""The loss of a micro-batch as a module, for wrapping by DDP and FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from smolstack.model import packer
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train.batches import MicroBatch
from smolstack.train.loss_mask import IGNORED
from smolstack.train.packed_rows import packed_rows

LOGITS_AT_ONCE = 256  # states; of a vocabulary of 49,280 their logits are 50 MB


class AnswerLoss(nn.Module):
    """Cross-entropy of the supervised tokens of a micro-batch, summed.

    Args:
        model: the network.
        projected: the states of frozen towers are the connector's outputs.
    """

    def __init__(self, model: VisionLanguageModel, *, projected: bool = False) -> None:
        super().__init__()
        self.model, self.projected = model, projected

    def forward(self, batch: MicroBatch) -> Tensor:
        """Return the sum over all tokens that contribute to the loss: a scalar, float32."""
        model = self.model
        embeddings: Tensor = model.decoder.embedding(batch.token_ids)
        visual = self._visual_tokens(batch)
        unused = None
        if visual is not None and not batch.images:
            unused, visual = visual, None
        if visual is not None:
            positions = packer.locate(
                batch.token_ids,
                model.config.image_token_id,
                batch.tiles_per_sequence,
                visual.shape[1],
            )
            embeddings = packer.splice(embeddings, positions, visual)
        wanted = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        if embeddings.device.type == "cpu" and len(set(batch.lengths)) > 1:
            states, wanted = self._packed(embeddings, wanted, batch.lengths)
        else:
            states = model.decoder(embeddings)
        carrying = wanted != IGNORED
        loss = self._cross_entropy(states[carrying], wanted[carrying])
        return loss if unused is None else loss + 0 * unused.float().sum()

    def _packed(
        self, embeddings: Tensor, wanted: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the states and targets of all tokens except padding, concatenated: (1, ΣT, D),
        (1, ΣT).

        A CPU takes as long for a padding token as for a real one. Every row attends only to itself.
        """
        real = torch.arange(embeddings.shape[1])[None] < torch.tensor(lengths)[:, None]
        states = self.model.decoder(embeddings[real][None], cache=packed_rows(lengths))
        return states, wanted[real][None]

    def _cross_entropy(self, states: Tensor, wanted: Tensor) -> Tensor:
        """Return the sum over states (R, D) and target tokens (R,).

        The logits of at most LOGITS_AT_ONCE states are in memory at a time; they are computed in
        chunks, and again for the gradient.
        """
        if len(states) <= LOGITS_AT_ONCE:
            return self._some(states, wanted)
        some = torch.split(states, LOGITS_AT_ONCE)
        parts = list(zip(some, torch.split(wanted, LOGITS_AT_ONCE), strict=True))
        if not torch.is_grad_enabled():
            return torch.stack([self._some(*part) for part in parts]).sum()
        losses = [checkpoint(self._some, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum()

    def _some(self, states: Tensor, wanted: Tensor) -> Tensor:
        logits = self.model.logits(states).float()
        return functional.cross_entropy(logits, wanted, reduction="sum")

    def _visual_tokens(self, batch: MicroBatch) -> Tensor | None:
        """Return (N, S, D), or None if there are no images and no part of the image path is
        trained.

        A batch without images passes one blank tile through the trained parts, for a gradient of
        zero: all processes must use the same weights, whatever their examples contain.
        """
        model = self.model
        towers = [*model.vision.parameters(), *model.connector.parameters()]
        if not batch.images and not any(parameter.requires_grad for parameter in towers):
            return None
        trained = any(parameter.requires_grad for parameter in model.vision.parameters())
        if trained or batch.pixels is not None:
            pixels = batch.pixels
            if pixels is None:
                edge = model.config.vision.image_size
                pixels = torch.zeros(1, 3, edge, edge, device=batch.token_ids.device)
            projected: Tensor = model.connector(model.vision(pixels), model.vision.grid_of(pixels))
            return projected
        states = batch.states
        if states is None:
            width = model.connector.proj.in_features
            states = torch.zeros(1, 1, width, device=batch.token_ids.device)
        if self.projected:
            return states
        through: Tensor = model.connector.proj(states)
        return through


@contextmanager
def recomputed(model: VisionLanguageModel, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing: activations of the layers are recomputed in the backward pass."""
    layers = [*model.vision.layers, *model.decoder.layers] if wanted else []
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)
