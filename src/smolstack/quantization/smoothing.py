"""Channels made more alike before rounding, without changing what a model computes.

A channel that is far larger than its neighbours takes the resolution of its whole group. It is
divided by a factor where it is made (a norm's weights, or the output channels of the layer before)
and the next weights are multiplied by it, so that at run time nothing is left to do: SmoothQuant
(Xiao et al. 2022) where activations are rounded to 8 bits, AWQ (Lin et al. 2023) where the weights'
4 bits are what loses. The factors come from what a layer reads and from its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.config.quantization import Format
from smolstack.quantization.calibration import Inputs
from smolstack.quantization.rounding import Factors, StoredWeight, kernels_for

_SMOOTHQUANT, _AWQ = 0.5, 0.3  # how much of a channel's size moves into the weights
_LEAST, _MOST = 1 / 256, 256.0
_QKV = ("attention.query", "attention.key", "attention.value")


def smooth_layer(
    layer: Any,
    inputs: Mapping[str, Inputs],
    formats: Mapping[str, Format],
    heads: int,
    kv_heads: int,
) -> dict[str, Factors]:
    """Smooth a layer of a tower: between its norms and what reads them, its values and the output
    projection, up and down.

    Args:
        layer: its norms, in float32, are changed in place; its weights stay as they are.
        inputs: what its linear parts read, by name; divided as their channels are.
        formats: of those parts that will be quantized, by name.
        heads, kv_heads: of its attention.

    Returns:
        What the weights of each linear part are to be multiplied by, and their biases by the
        outputs' factors.
    """
    parts = {name: part for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    made = {name: Factors() for name in parts}
    for norm, names in ((layer.attention_norm, _QKV), (layer.mlp_norm, ("gate", "up"))):
        readers = [name for name in names if name in parts]
        if any(name not in formats for name in readers):
            continue
        bits = min(formats[name].bits for name in readers)
        s = factors(inputs[readers[0]], [parts[name].weight for name in readers], bits)
        divide_norm(norm, s)
        for name in readers:
            made[name].inputs = s
            inputs[name].divide(s)
    value, out = parts["attention.value"], parts["attention.out"]
    if {"attention.value", "attention.out"} <= set(formats):
        read, head_dim = inputs["attention.out"], value.out_features // kv_heads
        s = factors(read, [out.weight], formats["attention.out"].bits)
        shared = of_value_heads(s, kv_heads, head_dim)
        s = for_query_heads(shared, heads, kv_heads, head_dim)
        made["attention.value"].outputs, made["attention.out"].inputs = 1 / shared, s
        read.divide(s)
    # down(act(gate) · up): what up puts out can be divided, since nothing bends it.
    if "gate" in parts and {"up", "down"} <= set(formats):
        s = factors(inputs["down"], [parts["down"].weight], formats["down"].bits)
        made["up"].outputs, made["down"].inputs = 1 / s, s
        inputs["down"].divide(s)
    return made


def factors(inputs: Inputs, weights: Sequence[Tensor], bits: int) -> Tensor:
    """By what each input channel of some layers is divided, (I,); geometric mean 1.

    s = a^α / w^(1-α): with 8-bit weights a and w are the largest magnitudes of a channel and
    α = 0.5, with 4-bit ones they are root mean squares and α = 0.3.
    """
    sizes = [channel_sizes(weight) for weight in weights]
    if bits == 8:
        size, alpha = inputs.largest, _SMOOTHQUANT
        weight = torch.stack([largest for largest, _ in sizes]).amax(dim=0)
    else:
        size, alpha = inputs.rms, _AWQ
        squares = [s / w.shape[0] for (_, s), w in zip(sizes, weights, strict=True)]
        weight = torch.stack(squares).amax(dim=0).sqrt()
    return balanced(size, weight, alpha)


def channel_sizes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each input channel of a weight (O, I) the largest magnitude and the sum of squares, (I,)
    each."""
    kernels = kernels_for(weight)
    if kernels is None:
        ends = weight.amax(dim=0), -weight.amin(dim=0)
        return torch.maximum(*ends).float(), weight.float().square().sum(dim=0)
    largest, squares = torch.empty(weight.shape[1]), torch.empty(weight.shape[1])
    stored = StoredWeight(weight, Factors())
    threads = torch.get_num_threads()
    if kernels.stored_sizes(stored.reference, largest.data_ptr(), squares.data_ptr(), threads):
        raise MemoryError(f"cannot allocate memory to measure a weight of {tuple(weight.shape)}")
    return largest, squares


def balanced(size: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Factors of channels; one that is never used, by activations or weights, stays as it is."""
    used = (size > 0) & (weight > 0)
    s = torch.where(used, size, 1.0) ** alpha / torch.where(used, weight, 1.0) ** (1 - alpha)
    if not bool(used.any()):
        return torch.ones_like(s)
    s = s / s[used].log().mean().exp()
    return torch.where(used, s, 1.0).clamp(_LEAST, _MOST)


def divide_norm(norm: nn.Module, by: Tensor) -> None:
    """What a norm puts out, divided channel by channel."""
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if value is not None:
            made = (value.detach().float() / by).to(torch.float32)
            setattr(norm, name, nn.Parameter(made, requires_grad=False))


def of_value_heads(per_query_head: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """What the output projection reads, (heads · K,), by the value channel that it comes from: the
    largest over the query heads that share a value head, (kv_heads · K,)."""
    return per_query_head.view(kv_heads, -1, head_dim).amax(dim=1).flatten()


def for_query_heads(per_value: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """The other way round: (kv_heads · K,) → (heads · K,)."""
    spread = per_value.view(kv_heads, 1, head_dim).expand(-1, heads // kv_heads, -1)
    return spread.flatten()
