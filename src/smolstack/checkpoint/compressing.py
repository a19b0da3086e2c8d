"""Writes quantized layers in compressed-tensors' "pack-quantized" form.

The form requires groups that divide a layer's input channels, and vLLM's kernels support at most
128 channels per group. Larger groups, and rows that end in a shorter group, are therefore written
as smaller groups with repeated scales and zero points, which changes no weight. What the form
cannot express, the groups used in computation and the bits of their activations, is written in
separate keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.checkpoint import keys
from smolstack.checkpoint.quantized_layer import SCALE, SHAPE, ZERO
from smolstack.checkpoint.schemes import METHOD, OWN, PACKED_FORM
from smolstack.config.quantization import Format
from smolstack.model.quantized import QuantizedLinear, unpack_words
from smolstack.model.vlm import VisionLanguageModel

MOST = 128  # channels of a written group
_LEAST = 8  # fewer, and scales would weigh as much as the weights: such rows keep a shorter group
_MIDDLE = 8  # the zero point of symmetric 4-bit weights


def stored_group(form: Format, inputs: int) -> int | None:
    """Return the channels of a written group; None: one scale for all channels of a row."""
    if form.groups(inputs) == 1:
        return None
    found = math.gcd(form.group, inputs, MOST)
    return found if found >= _LEAST else form.group


def stored_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return the model's tensors in written form, by smolstack name.

    Weights that a backend has packed are unpacked, all at once. Zero points are omitted for layers
    in which all of them are the middle value.
    """
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        inputs, outputs, form = layer.in_features, layer.out_features, layer.format
        state[f"{name}.{SHAPE}"] = torch.tensor([outputs, inputs])
        zeros = state.get(f"{name}.{ZERO}")
        if zeros is not None and bool((unpack_words(zeros.t(), 4, outputs) == _MIDDLE).all()):
            del state[f"{name}.{ZERO}"]
        group = stored_group(form, inputs)
        if group is None or group == form.group:
            continue
        columns = torch.arange(0, inputs, group, device=layer.device) // form.group
        for end in (SCALE, ZERO):
            if f"{name}.{end}" in state:
                state[f"{name}.{end}"] = state[f"{name}.{end}"][:, columns]
    return state


def to_config(model: VisionLanguageModel, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return quantization_config for config.json; None if the model has no integer weights.

    Args:
        state: the result of :func:`stored_state` for the model.
    """
    quantization = model.config.quantization
    if quantization is None:
        return None
    embedding = model.config.embedding_dim is not None
    groups: dict[tuple[int, int, int, int, bool], list[str]] = {}
    for name, form in quantization:
        own = keys.to_hf(f"{name}.weight", embedding_head=embedding).removesuffix(".weight")
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        written = stored_group(form, layer.in_features) or -1
        kind = form.bits, form.group, form.activation_bits, written, f"{name}.{ZERO}" not in state
        groups.setdefault(kind, []).append(own)
    floats = [
        keys.to_hf(f"{name}.weight", embedding_head=embedding).removesuffix(".weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    order = sorted(groups)
    return {
        "quant_method": METHOD,
        "format": PACKED_FORM,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": sorted(groups[kind]),
                "weights": _weights(bits, written, symmetric=symmetric),
                "input_activations": None,
                "output_activations": None,
            }
            for i, kind in enumerate(order)
            for bits, _, _, written, symmetric in (kind,)
        },
        "ignore": sorted(floats),
        "kv_cache_scheme": None,
        OWN: {
            "groups": {f"group_{i}": kind[1] for i, kind in enumerate(order)},
            "activation_bits": {f"group_{i}": kind[2] for i, kind in enumerate(order)},
        },
    }


def _weights(bits: int, group: int, *, symmetric: bool) -> dict[str, Any]:
    size = {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **size, "dynamic": False}
