"""Which layers of a model are quantised under which scheme, and quantising them.

Norms, positions, the patch embedding and the token embedding (a table, read one row per token)
keep their floats; everything that multiplies large matrices is quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smolstack.config.model import SCHEMES
from smolstack.errors import ConfigError
from smolstack.model.quantised import GROUP, QuantisedLinear
from smolstack.native import library as native

if TYPE_CHECKING:
    from smolstack.model.vlm import VisionLanguageModel

# Keys and values beside quantised weights: half the bytes, and eight times finer than bfloat16.
CACHE_DTYPE = torch.float16
_QUANTISED = ("vision.layers.", "connector.", "decoder.layers.", "head")
_FOUR_BITS = ("decoder.layers.", "head")


def bits_of(name: str, in_features: int, scheme: str) -> int | None:
    """Bits of a linear layer's weights under a scheme; None: it keeps its floats."""
    if scheme not in SCHEMES:
        raise ConfigError(f"the scheme is {scheme!r}, expected one of {list(SCHEMES)}")
    if not name.startswith(_QUANTISED):
        return None
    few = scheme == "int4" and name.startswith(_FOUR_BITS) and in_features % GROUP == 0
    return 4 if few else 8


def quantise(model: VisionLanguageModel, scheme: str) -> VisionLanguageModel:
    """Quantise a float model in place, and return it.

    A tied head becomes a layer of its own (the table that it shared stays as it is), a head for
    retrieval keeps its floats. What is not quantised computes in float32.
    """
    if model.scheme is not None:
        raise ConfigError(f"the model is {model.scheme} already, quantising it again loses more")
    if model.head is None:
        weight = model.decoder.embedding.weight
        model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        model.head.weight = nn.Parameter(weight, requires_grad=False)
    kernels = native.library()
    for name, bits in [(name, bits) for name, _, bits in _layers(model, scheme)]:
        layer = model.get_submodule(name)  # one at a time, so that each is let go at once
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        _replace(model, name, QuantisedLinear.from_float(weight, _bias(layer), bits))
        if kernels is not None and weight.device.type == "cpu":
            kernels.put_aside(weight.data_ptr(), weight.nbytes)  # a mapped file's pages
    tied = model.config.tied and model.head is None
    model.config = replace(model.config, tied=tied, scheme=scheme)
    return model.float().eval()


def lay_out(model: VisionLanguageModel, scheme: str) -> None:
    """Put quantised layers without values into the places of a model's own."""
    for name, layer, bits in list(_layers(model, scheme)):
        bias = layer.bias is not None
        with layer.weight.device:
            made = QuantisedLinear(layer.in_features, layer.out_features, bits, bias=bias)
        _replace(model, name, made)


def _layers(model: VisionLanguageModel, scheme: str) -> Iterator[tuple[str, nn.Linear, int]]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name == "head" and model.config.embedding_dim is not None:
            continue
        bits = bits_of(name, module.in_features, scheme)
        if bits is not None:
            yield name, module, bits


def _bias(layer: nn.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
