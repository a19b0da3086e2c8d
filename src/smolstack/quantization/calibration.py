"""What flows through a model's layers: the inputs that quantisation is fitted to.

A tower is walked layer by layer: the states that enter a layer go through its float weights, what
each of its linear parts reads is measured, and only then is the layer quantised. So no more than
one layer is ever held as floats.

Without data a model calibrates itself, on tokens drawn at random and a small tile of shapes and
noise: which channels are large is a property of the weights far more than of what is read (on
SmolLM2-135M random tokens did as well as English to a few parts in a hundred).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 48  # that a model is calibrated on when it is given nothing
_SIDE = 12  # patches on a side of the tile that it sees then
_SEED = 20


@dataclass
class Inputs:
    """What a linear layer read: of each input channel the largest magnitude and the sum of squares.

    Attributes:
        sums: (I, I), the sum of x xᵀ over rows; None where nobody asked for it.
        rows: how many were read.
    """

    largest: Tensor
    square: Tensor
    rows: int = 0
    sums: Tensor | None = None

    @classmethod
    def nothing(cls, width: int, *, products: bool = False) -> Inputs:
        sums = torch.zeros(width, width) if products else None
        return cls(torch.zeros(width), torch.zeros(width), sums=sums)

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self.sums is not None:
            self.sums = self.sums.to(rows.device).addmm_(rows.t(), rows)
        self.largest = torch.maximum(self.largest.to(rows.device), rows.abs().amax(dim=0))
        self.square = self.square.to(rows.device) + rows.square().sum(dim=0)
        self.rows += rows.shape[0]

    def divide(self, by: Tensor) -> None:
        """What would have been read of inputs that were divided, channel by channel."""
        self.largest, self.square = self.largest / by, self.square / by.square()
        if self.sums is not None:
            self.sums = self.sums / by[:, None] / by

    @property
    def rms(self) -> Tensor:
        return (self.square / max(self.rows, 1)).sqrt()

    @property
    def products(self) -> Tensor | None:
        """(I, I), the mean of x xᵀ."""
        return None if self.sums is None else self.sums / max(self.rows, 1)


@contextmanager
def observed(
    layers: Mapping[str, nn.Linear], products: Collection[str] = ()
) -> Iterator[dict[str, Inputs]]:
    """What the given linear layers read while the block runs; of some, the products too."""
    found: dict[str, Inputs] = {}
    hooks = []
    for name, layer in layers.items():
        found[name] = Inputs.nothing(layer.in_features, products=name in products)
        hooks.append(layer.register_forward_pre_hook(_adding(found[name])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _adding(inputs: Inputs) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, arguments: Any) -> None:
        inputs.add(arguments[0])

    return hook


def drawn_tokens(
    vocabulary: int, avoid: Sequence[int], first: int | None, count: int = TOKENS, seed: int = _SEED
) -> Tensor:
    """Tokens at random, (1, count); the first one is what texts begin with."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (1, count), generator=generator)
    for token in avoid:
        tokens[tokens == token] = (token + 1) % vocabulary
    if first is not None:
        tokens[0, 0] = first
    return tokens


def drawn_tile(patch: int, side: int) -> Tensor:
    """A tile of coloured shapes over a gradient with a little noise: (1, 3, P, P) from -1 to 1."""
    generator = torch.Generator().manual_seed(_SEED)
    size = patch * min(side, _SIDE)
    ramp = torch.linspace(-1, 1, size)
    tile = torch.stack(
        (ramp[:, None].expand(size, size), ramp.expand(size, size), -ramp.expand(size, size))
    )
    tile = tile.clone()
    for _ in range(24):
        top, left, high, wide = torch.randint(0, size, (4,), generator=generator).tolist()
        colour = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        tile[:, top : top + high // 3, left : left + wide // 3] = colour
    tile += torch.randn(tile.shape, generator=generator) * 0.1
    return tile.clamp_(-1, 1)[None]
