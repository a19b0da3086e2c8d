"""Converts tokenized examples to tensors: their order, and micro-batches padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.errors import DataError
from smolstack.processor.geometry import TilePlan
from smolstack.processor.inputs import ImageInput
from smolstack.processor.processor import Processor
from smolstack.processor.tiles import ImageSource
from smolstack.train.data import Source
from smolstack.train.loss_mask import IGNORED, Supervisor, TokenizedExample


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass.

    Padding is on the right: with causal attention it does not affect real tokens, so there is no
    mask. (On a CPU the decoder is given the real tokens alone, see AnswerLoss.)

    Attributes:
        token_ids: (B, T) int64.
        lengths: tokens of each row without its padding, length B; empty: T each.
        labels: (B, T) int64, the token's id where it contributes to the loss, IGNORED elsewhere.
        tiles_per_sequence: tiles of each row, length B.
        images: every image with its plan, in order.
        pixels: (N, 3, P, P) normalized tiles of all images, if the vision tower is trained.
        states: (N, S, X), outputs of a frozen tower (see FrozenTower).
    """

    token_ids: Tensor
    labels: Tensor
    tiles_per_sequence: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    images: tuple[tuple[ImageInput, TilePlan], ...] = ()
    pixels: Tensor | None = None
    states: Tensor | None = None

    @property
    def supervised(self) -> int:
        """Number of tokens that contribute to the loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on ``device``."""
        pixels, states = self.pixels, self.states
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            labels=self.labels.to(device),
            pixels=None if pixels is None else pixels.to(device),
            states=None if states is None else states.to(device),
        )


def collate(
    tokenized_examples: Sequence[TokenizedExample], pad_id: int, processor: Processor | None
) -> MicroBatch:
    """Return tokenized examples as one micro-batch, with tiles if a processor is given."""
    longest = max(len(tokenized.token_ids) for tokenized in tokenized_examples)
    token_ids = torch.full((len(tokenized_examples), longest), pad_id, dtype=torch.long)
    labels = torch.full_like(token_ids, IGNORED)
    for row, tokenized in enumerate(tokenized_examples):
        token_ids[row, : len(tokenized.token_ids)] = torch.tensor(tokenized.token_ids)
        labels[row, : len(tokenized.labels)] = torch.tensor(tokenized.labels)
    images = tuple(
        pair
        for tokenized in tokenized_examples
        for pair in zip(tokenized.images, tokenized.plans, strict=True)
    )
    pixels = None
    if processor is not None and images:
        pixels = torch.cat([processor.pixels(as_source(p), plan) for p, plan in images])
    return MicroBatch(
        token_ids,
        labels,
        tuple(sum(plan.tiles for plan in tokenized.plans) for tokenized in tokenized_examples),
        tuple(len(tokenized.token_ids) for tokenized in tokenized_examples),
        images,
        pixels,
    )


def as_source(image: ImageInput) -> ImageSource:
    """Return an image of training data, which is never visual tokens."""
    if isinstance(image, VisualTokens):
        raise DataError("a training example contains visual tokens, expected an image")
    return image


class Order:
    """The endless order of examples: epochs, each shuffled by the seed and its number.

    The example at position ``i`` does not depend on earlier calls, so a run can resume anywhere.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.count, generator=generator)
            self._epoch = epoch
        return int(self._permutation[place])


class StepBatches(torch.utils.data.Dataset[list[MicroBatch]]):
    """The micro-batches that one process reads per step.

    The global batch is the same for any number of processes: positions step · batch to
    (step + 1) · batch of the order, distributed to the processes in turn.

    Args:
        source, supervisor: provide the tokenized examples.
        seed: seed of the order.
        batch: examples per step over all processes.
        micro_batch: examples per forward pass.
        cut: preprocess images into tiles, for training the vision tower.
        rank, processes: index of this process, and number of processes.
    """

    def __init__(
        self,
        source: Source,
        supervisor: Supervisor,
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        cut: bool,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.source, self.supervisor = source, supervisor
        self.order = Order(len(source), seed)
        self.batch, self.micro_batch, self.cut = batch, micro_batch, cut
        self.rank, self.processes = rank, processes

    def __getitem__(self, step: int) -> list[MicroBatch]:
        first = step * self.batch
        mine = range(first + self.rank, first + self.batch, self.processes)
        tokenized_examples = [
            self.supervisor(self.source[self.order[position]]) for position in mine
        ]
        return batches_of(
            tokenized_examples, self.micro_batch, self.supervisor.processor, cut=self.cut
        )


def batches_of(
    tokenized_examples: Sequence[TokenizedExample], size: int, processor: Processor, *, cut: bool
) -> list[MicroBatch]:
    """Return tokenized examples in micro-batches of ``size``, in order."""
    return [
        collate(
            tokenized_examples[start : start + size], processor.pad_id, processor if cut else None
        )
        for start in range(0, len(tokenized_examples), size)
    ]
