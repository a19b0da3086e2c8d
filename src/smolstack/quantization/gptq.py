"""GPTQ: 4-bit rounding that minimizes the error of a layer's output, not only of its weights.

Channel by channel, the rounding error of each weight is compensated by the channels not yet
processed, as far as they are correlated in the layer's inputs (Frantar et al. 2022; the arithmetic
is Optimal Brain Surgeon's, Hassibi & Stork 1993). Scales and zero points are fixed beforehand, so
channels can be processed in order of magnitude, largest first.

Shapes: O output channels, I input channels, G groups of input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smolstack.config.quantization import Format
from smolstack.quantization.rounding import rounded_words

# How far products of different channels are shrunk towards zero (Ledoit & Wolf 2004): correlations
# estimated from a few thousand tokens are partly chance, and partly due to their topic.
SHRINKAGE = 0.3
_DAMPING = 0.01  # fraction of the diagonal's mean, added to it
_BLOCK = 32  # channels whose errors reach the channels behind them in one product
_MOST = 15


def round_fitted(
    weight: Tensor, form: Format, products: Tensor, shrinkage: float = SHRINKAGE
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight, fitted to the layer's inputs.

    Args:
        weight: (O, I), float32.
        form: of 4 bits.
        products: (I, I), the mean of x xᵀ over the layer's inputs.
        shrinkage: from 0, the products as they are, to 1, only their diagonal, which is rounding
            to nearest.

    Returns:
        As :func:`~smolstack.quantization.rounding.round_weight`: integers (O, I), scales (O, G) in
        bfloat16, zero points (O, G).
    """
    outputs, inputs = weight.shape
    diagonal = products.diagonal() + max(float(products.diagonal().mean()) * _DAMPING, 1e-12)
    _, scale, zeros = rounded_words(weight, form, diagonal)
    assert zeros is not None, form
    order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(products, diagonal, shrinkage, order)
    weight = weight[:, order].t().contiguous()  # one row per channel, overwritten
    numbers = torch.empty(inputs, outputs, dtype=torch.uint8, device=weight.device)
    step, zero = scale.t().float().contiguous(), zeros.t().float().contiguous()
    inverse = torch.where(step > 0, 1 / step, 0)
    groups, pivots = (order // form.group).tolist(), factor.diagonal().tolist()
    for first in range(0, inputs, _BLOCK):
        last = min(first + _BLOCK, inputs)
        block, errors = weight[first:last], torch.empty_like(weight[first:last])
        rows = factor[first:last, first:last]
        for i in range(last - first):
            at = groups[first + i]
            q = (block[i] * inverse[at]).round_().add_(zero[at]).clamp_(0, _MOST)
            numbers[first + i] = q
            error = block[i].sub(q.sub_(zero[at]).mul_(step[at])).div_(pivots[first + i])
            errors[i] = error
            block[i + 1 :].addr_(rows[i, i + 1 :], error, alpha=-1)
        weight[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    given = torch.empty_like(numbers)
    given[order] = numbers
    return given.t().contiguous(), scale, zeros


def _inverse_factor(products: Tensor, diagonal: Tensor, shrinkage: float, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, channels in the given order: (I, I).

    It is computed from the shrunk correlations, for which float32 is precise enough, and rescaled.
    """
    size = diagonal.sqrt()
    shrunk = products / size[:, None] / size * (1 - shrinkage)
    shrunk.diagonal().fill_(1)
    shrunk = shrunk[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shrunk))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True) / size[order]
    return factor
