"""The loss of a micro-batch as a module, for wrapping by DDP and FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from smolstack.model import packer
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train.batches import MicroBatch
from smolstack.train.language import alone, divergence, without_adapters
from smolstack.train.loss_mask import IGNORED
from smolstack.train.packed_rows import packed_rows

LOGITS_AT_ONCE = 256  # states; of a vocabulary of 49,280 their logits are 50 MB


class AnswerLoss(nn.Module):
    """Cross-entropy of the supervised tokens of a micro-batch, summed.

    Args:
        model: the network.
        projected: the states of frozen towers are the connector's outputs.
        keep_language: weight of the divergence from the model without its adapters, which is
            added on examples without images while the model is in training mode.

    Attributes:
        language: that divergence without its weight, and its number of tokens, both summed since
            the last reset: (2,) float64.
    """

    def __init__(
        self, model: VisionLanguageModel, *, projected: bool = False, keep_language: float = 0.0
    ) -> None:
        super().__init__()
        self.model, self.projected, self.keep_language = model, projected, keep_language
        self.language = torch.zeros(2, dtype=torch.float64)

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
        states = self._states(embeddings, wanted, batch.lengths)
        loss = self._in_chunks(self._cross_entropy, states, wanted[wanted != IGNORED])
        if self.keep_language and model.training:
            loss = loss + self.keep_language * self._divergence(batch, states, wanted)
        return loss if unused is None else loss + 0 * unused.float().sum()

    def _states(self, embeddings: Tensor, wanted: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the decoder's states (R, D) of the tokens with a target.

        A CPU takes as long for a padding token as for a real one, so it is given the rows without
        their padding, concatenated; every row attends only to itself.
        """
        if embeddings.device.type != "cpu" or len(set(lengths)) < 2:
            padded: Tensor = self.model.decoder(embeddings)
            return padded[wanted != IGNORED]
        real = torch.arange(embeddings.shape[1])[None] < torch.tensor(lengths)[:, None]
        packed = self.model.decoder(embeddings[real][None], cache=packed_rows(lengths))[0]
        return cast("Tensor", packed[wanted[real] != IGNORED])

    def _divergence(self, batch: MicroBatch, states: Tensor, wanted: Tensor) -> Tensor:
        """Return KL(model without adapters ‖ model), summed over the tokens (of ``states``, (R, D))
        with a target in rows without images.

        Where processes share the weights' shards, each of them computes the reference, be it of one
        token: they must run the same layers.
        """
        rows = [row for row, tiles in enumerate(batch.tiles_per_sequence) if not tiles]
        if not rows and alone():
            return states.new_zeros(())
        token_ids = batch.token_ids[rows] if rows else batch.token_ids[:1, :1]
        targets = wanted[rows] if rows else wanted[:0]
        lengths = [batch.lengths[row] for row in rows] if batch.lengths else []
        with torch.no_grad(), without_adapters(self.model):
            embeddings = self.model.decoder.embedding(token_ids)
            if not rows:
                self.model.decoder(embeddings)
                return states.new_zeros(())
            reference = self._states(embeddings, targets, lengths)
        text_only = torch.tensor([not tiles for tiles in batch.tiles_per_sequence])
        kept = text_only.to(wanted.device)[:, None].expand_as(wanted)[wanted != IGNORED]
        found = self._in_chunks(self._kept, states[kept], reference)
        self.language += torch.tensor([float(found.detach()), len(reference)], dtype=torch.float64)
        return found

    def _in_chunks(
        self, function: Callable[[Tensor, Tensor], Tensor], states: Tensor, targets: Tensor
    ) -> Tensor:
        """Return the sum of ``function`` over states (R, D) and their targets (R, …).

        The logits of at most LOGITS_AT_ONCE states are in memory at a time; they are computed in
        chunks, and again for the gradient.
        """
        if len(states) <= LOGITS_AT_ONCE:
            return function(states, targets)
        some = torch.split(states, LOGITS_AT_ONCE)
        parts = list(zip(some, torch.split(targets, LOGITS_AT_ONCE), strict=True))
        if not torch.is_grad_enabled():
            return torch.stack([function(*part) for part in parts]).sum()
        losses = [checkpoint(function, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum()

    def _cross_entropy(self, states: Tensor, wanted: Tensor) -> Tensor:
        logits = self.model.logits(states).float()
        return functional.cross_entropy(logits, wanted, reduction="sum")

    def _kept(self, states: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self.model.logits(reference).float()
        return divergence(expected, self.model.logits(states).float())

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
