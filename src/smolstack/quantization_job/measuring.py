"""Measures the quantized model's divergence from the float model on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smolstack.bench.quality.divergence import Divergence
from smolstack.generation.inline import InlineEngine
from smolstack.quantization_job.samples import Sample
from smolstack.vlm import VLM

_MOST = 2048  # number of compared positions; their logits are kept in memory


@dataclass(frozen=True)
class Measured:
    """Quality before and after.

    Attributes:
        perplexity: the float model's perplexity.
        after: of the quantized one, with its divergence from the float one; None for a model that
            gives no answers.
        samples: measured on.
    """

    perplexity: float | None
    after: Divergence | None
    samples: int


class Reference:
    """The float model's logits before each text token."""

    def __init__(self, logits: Sequence[Tensor], perplexity: float | None) -> None:
        self._logits, self.perplexity = logits, perplexity

    @classmethod
    @torch.no_grad()
    def of(cls, vlm: VLM, engine: InlineEngine, samples: Sequence[Sample]) -> Reference:
        """Compute a model's logits."""
        if vlm.model.config.embedding_dim is not None:
            return cls([], None)
        found, own, held = [], Divergence(), 0
        for sample in samples:
            logits, targets = _logits(vlm, engine, sample)
            logits, targets = logits[: _MOST - held], targets[: _MOST - held]
            held += len(targets)
            found.append(logits)
            own.add(logits, logits, targets)
        return cls(found, own.perplexity if own.tokens else None)

    @torch.no_grad()
    def compare(
        self, vlm: VLM, engine: InlineEngine, samples: Sequence[Sample]
    ) -> Divergence | None:
        """Compare another model on the same samples."""
        if self.perplexity is None:
            return None
        total = Divergence()
        for sample, expected in zip(samples, self._logits, strict=True):
            logits, targets = _logits(vlm, engine, sample)
            total.add(expected, logits[: len(expected)], targets[: len(expected)])
        return total


def merged_embeddings(vlm: VLM, engine: InlineEngine, sample: Sample) -> Tensor:
    """Return the decoder's input for a sample, visual tokens included: (1, T, D)."""
    (visual,) = engine.encode([sample.prompt])
    return vlm.model.merge(vlm.processor.batch([replace(sample.prompt, images=tuple(visual))]))


def _logits(vlm: VLM, engine: InlineEngine, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return (T, V) logits before each text token, and these tokens (T,)."""
    model = vlm.model
    states = model.decoder(merged_embeddings(vlm, engine, sample))[0, :-1]
    targets = torch.tensor(sample.prompt.token_ids)[1:]
    text = targets != model.config.image_token_id
    return model.logits(states[text.to(states.device)][None])[0].float(), targets[text]
