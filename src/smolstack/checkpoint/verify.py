"""Compares the weights of a checkpoint with those that its config describes, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from smolstack.checkpoint import keys
from smolstack.checkpoint.compressed import with_quantization
from smolstack.checkpoint.quantized_layer import PACKED
from smolstack.checkpoint.weights import FLOAT_TYPES, Entry
from smolstack.config import ModelConfig
from smolstack.errors import CheckpointError
from smolstack.model.vlm import VisionLanguageModel

_INTEGERS = {torch.int32: ("I32",)}


@dataclass(frozen=True)
class Comparison:
    """Differences between the weights expected and found, by checkpoint name."""

    expected: int
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.extra or self.misshaped)

    def raise_if_wrong(self, where: object) -> None:
        """Raise a CheckpointError that lists the differences (the first few of each kind)."""
        if self.ok:
            return
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
            for kind, names in (
                ("missing", self.missing),
                ("extra", self.extra),
                ("of wrong shape or format", self.misshaped),
            )
            if names
        ]
        raise CheckpointError(
            f"{where} does not match its config ({self.expected} weights expected): "
            + "; ".join(parts)
        )


def settle_head(config: ModelConfig, entries: Mapping[str, Entry]) -> ModelConfig:
    """Return the config with its head and quantized layers as determined by the weights; the tie
    flag is not trusted.
    """
    retrieval = (f"{keys.EMBEDDING_HEAD}.{end}" for end in ("weight", PACKED))
    embedding = next((entries[name] for name in retrieval if name in entries), None)
    if embedding is not None and len(embedding.shape) == 2:
        config = replace(config, tied=False, embedding_dim=embedding.shape[0])
    else:
        heads = {f"{keys.LM_HEAD}.weight", f"{keys.LM_HEAD}.{PACKED}"}
        config = replace(config, tied=not heads & set(entries), embedding_dim=None)
    return with_quantization(config, entries)


def expected_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Return all weights by checkpoint name, without values (on the meta device)."""
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    embedding = config.embedding_dim is not None
    return {
        keys.to_hf(name, embedding_head=embedding): tensor
        for name, tensor in model.state_dict().items()
    }


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by checkpoint name."""
    return {name: tuple(tensor.shape) for name, tensor in expected_weights(config).items()}


def unlike(entry: Entry, expected: Tensor) -> str:
    """Describe how a stored weight differs from the expected one; empty if it does not."""
    if entry.shape != tuple(expected.shape):
        return f"{list(entry.shape)} instead of {list(expected.shape)}"
    formats = _INTEGERS.get(expected.dtype, FLOAT_TYPES)
    if entry.dtype not in formats:
        return f"{entry.dtype} instead of {' or '.join(formats)}"
    return ""


def compare(config: ModelConfig, entries: Mapping[str, Entry]) -> Comparison:
    """Compare names and shapes; ``config`` must come from :func:`settle_head`."""
    return compare_weights(expected_weights(config), entries)


def compare_weights(expected: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> Comparison:
    """Compare names and shapes of expected and stored weights."""
    differences = {
        name: unlike(entries[name], weight)
        for name, weight in sorted(expected.items())
        if name in entries
    }
    return Comparison(
        expected=len(expected),
        missing=sorted(set(expected) - set(entries)),
        extra=sorted(set(entries) - set(expected)),
        misshaped=[
            f"{name} {difference}" for name, difference in differences.items() if difference
        ],
    )
