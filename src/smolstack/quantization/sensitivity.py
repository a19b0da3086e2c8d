"""What rounding a layer costs the model: the error of what it puts out, times what that matters.

To second order the KL divergence between the model's answers before and after a small change is
half the change's square under the Fisher information (Kullback 1959; so LeCun et al. 1990 and
HAWQ, Dong et al. 2019, tell which weights matter). Its diagonal, for what each layer puts out, is
the mean square of the gradients of log p(token) with tokens drawn from the model itself: one pass
forward and back gives it for all layers.

Shapes: O output channels, I input channels, T tokens of a sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from smolstack.config.quantization import INT4, Format
from smolstack.model.quantized import QuantizedLinear
from smolstack.model.vlm import VisionLanguageModel
from smolstack.quantization.calibration import Inputs, observed
from smolstack.quantization.rounding import rounded_words
from smolstack.quantization.smoothing import smooth_layer

_SEED = 21


def output_fisher(
    model: VisionLanguageModel,
    embeddings: Sequence[Tensor],
    progress: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """How much it matters what the decoder's linear layers put out, by name, each (O,).

    Args:
        model: with float weights.
        embeddings: sequences, each (1, T, D).
        progress: is told of every sequence.

    Returns:
        For each layer of the decoder and "head" the mean over tokens of the squared gradient.
    """
    decoder = model.decoder
    head = head_weight(model)
    layers = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    found = {f"decoder.{name}": torch.zeros(layer.out_features) for name, layer in layers.items()}
    found["head"] = torch.zeros(head.shape[0])
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    hooks = [
        layer.register_full_backward_hook(_adding(found[f"decoder.{name}"]))
        for name, layer in layers.items()
    ]
    generator = torch.Generator().manual_seed(_SEED)
    rows = 0
    try:
        model.requires_grad_(False)
        for sequence in embeddings:
            with torch.enable_grad():
                x = sequence.detach().to(decoder.embedding.weight.dtype).requires_grad_(True)
                angles = decoder.angles(0, x.shape[1], None, x)
                for layer in decoder.layers:  # made anew on the way back, so as to hold but one
                    x = checkpoint.checkpoint(layer, x, *angles, None, None, use_reentrant=False)
                scores = nn.functional.linear(decoder.norm(x), head).float()[0]
                likely = scores.detach().softmax(dim=-1)
                drawn = likely.cpu().multinomial(1, generator=generator).to(likely.device)
                loss = nn.functional.cross_entropy(scores, drawn[:, 0], reduction="sum")
                torch.autograd.backward(loss)
            found["head"] += (likely * (1 - likely)).sum(dim=0).cpu()
            rows += scores.shape[0]
            if progress is not None:
                progress()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, grad in wanted:
            parameter.requires_grad_(grad)
    return {name: total / max(rows, 1) for name, total in found.items()}


def head_weight(model: VisionLanguageModel) -> Tensor:
    """The head's weights, or the token embedding's where that is the head: (V, D)."""
    head = model.decoder.embedding if model.head is None else model.head
    assert isinstance(head, (nn.Linear, nn.Embedding))
    return head.weight


def _adding(total: Tensor) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, gradients: Any) -> None:
        rows = gradients[0].detach().float().reshape(-1, total.shape[0])
        total.add_(rows.square().sum(dim=0).cpu())

    return hook


@torch.no_grad()
def rounding_costs(
    model: VisionLanguageModel,
    embeddings: Sequence[Tensor],
    fisher: Mapping[str, Tensor],
    candidates: Mapping[str, Sequence[Format]],
    progress: Callable[[], None] | None = None,
) -> dict[str, dict[Format, float]]:
    """What each format of each layer would cost, in nats of KL divergence a token, to second order.

    Layers are smoothed and rounded to nearest, as a copy; the model stays as it is.

    Args:
        model: with float weights.
        embeddings: sequences, each (1, T, D).
        fisher: of :func:`output_fisher`.
        candidates: the formats to be tried, by the layer's name.
        progress: is told of every layer of the decoder, and of the head.
    """
    decoder, config = model.decoder, model.config.text
    costs: dict[str, dict[Format, float]] = {}
    states = [some.float() for some in embeddings]
    for i, own in enumerate(decoder.layers):
        layer = copy.deepcopy(own).float()
        parts = {n: p for n, p in layer.named_modules() if isinstance(p, nn.Linear)}
        with observed(parts) as inputs:
            states = [layer(x, *decoder.angles(0, x.shape[1], None, x), None, None) for x in states]
        factors = smooth_layer(
            layer, inputs, dict.fromkeys(parts, INT4), config.num_heads, config.num_kv_heads
        )
        for name, part in parts.items():
            full = f"decoder.layers.{i}.{name}"
            if full in candidates:
                args = factors[name].of(part.weight), inputs[name], fisher[full]
                costs[full] = _costs(*args, candidates[full])
        if progress is not None:
            progress()
    if "head" in candidates:
        read = Inputs.nothing(config.hidden_size)
        norm = copy.deepcopy(decoder.norm).float()
        for x in states:
            read.add(norm(x))
        costs["head"] = _costs(head_weight(model), read, fisher["head"], candidates["head"])
    if progress is not None:
        progress()
    return costs


def _costs(
    weight: Tensor, inputs: Inputs, fisher: Tensor, formats: Sequence[Format]
) -> dict[Format, float]:
    square = inputs.rms.square()
    importance = square + square.mean() * 1e-3
    found = {}
    for form in formats:
        total = 0.0
        for some, matters in zip(torch.split(weight, 4096), torch.split(fisher, 4096), strict=True):
            rows = some.float()
            rounded = rounded_words(rows, form, importance)
            made = QuantizedLinear.of_words(form, rows.shape[1], rounded, None)
            error = (made.dequantized() - rows).square() @ square
            total += float(error @ matters.to(error.device)) / 2
        found[form] = total
    return found
