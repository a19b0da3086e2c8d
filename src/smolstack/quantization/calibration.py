"""Calibration: measure the inputs of a model's linear layers.

A tower is processed layer by layer: the states that enter a layer pass through its float weights,
the inputs of its linear parts are measured, and then the layer is quantized. So at most one layer
is held as floats.

Without data a model is calibrated on random tokens and a small tile of shapes and noise: which
channels are large depends far more on the weights than on the input (on SmolLM2-135M random tokens
did as well as English to within a few percent).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.native import library as native
from smolstack.quantization.rounding import Factors, StoredWeight, kernels_for

TOKENS = 48  # calibration tokens if no data is given
_SIDE = 12  # patches per side of the synthetic tile
_SEED = 20
_FEW = 512  # rows


@dataclass
class Inputs:
    """Per-channel statistics of a linear layer's inputs: maximum magnitude and sum of squares.

    Attributes:
        sums: (I, I), the sum of x xᵀ over rows; None if not requested.
        rows: number of rows read.
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
        """The statistics of the same inputs divided channel by channel."""
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
    """Record the inputs of the given linear layers while the block runs; for some, the
    products too.
    """
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


@contextmanager
def multiplied_where_stored(layers: Mapping[str, nn.Linear], rows: int) -> Iterator[None]:
    """Multiply float32 rows by weights in their stored dtype while the block runs.

    This avoids float32 copies of the weights. If the layers will be given many rows, a copy is
    faster, and the layers are converted to float32.
    """
    few = rows <= _FEW
    made = [(layer, kernels_for(layer.weight) if few else None) for layer in layers.values()]
    try:
        for layer, kernels in made:
            if kernels is None:
                layer.float()
            else:
                layer.forward = _product(layer, kernels)  # type: ignore[method-assign,assignment]
        yield
    finally:
        for layer, kernels in made:
            if kernels is not None:
                del layer.forward


def _product(layer: nn.Linear, kernels: native.Library) -> Callable[[Tensor], Tensor]:
    stored = StoredWeight(layer.weight, Factors())
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()

    def forward(x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, layer.in_features).float().contiguous()
        out = torch.empty(rows.shape[0], layer.out_features)
        failed = kernels.stored_product(
            stored.reference,
            None if bias is None else bias.data_ptr(),
            rows.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"cannot allocate memory for {rows.shape[0]} rows of a linear layer")
        return out.view(*x.shape[:-1], -1)

    return forward


def _adding(inputs: Inputs) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, arguments: Any) -> None:
        inputs.add(arguments[0])

    return hook


def drawn_tokens(
    vocabulary: int, avoid: Sequence[int], first: int | None, count: int = TOKENS, seed: int = _SEED
) -> Tensor:
    """Random tokens, (1, count); the first is the token that texts begin with."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (1, count), generator=generator)
    for token in avoid:
        tokens[tokens == token] = (token + 1) % vocabulary
    if first is not None:
        tokens[0, 0] = first
    return tokens


def drawn_tile(patch: int, side: int) -> Tensor:
    """A tile of colored shapes over a gradient with a little noise: (1, 3, P, P) from -1 to 1."""
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
