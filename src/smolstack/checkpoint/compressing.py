"""Quantised layers in compressed-tensors' "pack-quantized" form, for transformers and for us.

Scales stand for groups as they are computed: where a group does not divide a row, the last one is
shorter. What that form has no word for, the bits of the activations, stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.checkpoint import keys
from smolstack.checkpoint.compressed import SHAPE
from smolstack.checkpoint.schemes import METHOD, OWN, PACKED_FORM
from smolstack.model.quantised import QuantisedLinear
from smolstack.model.vlm import VisionLanguageModel


def shapes(model: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
    """weight_shape of every quantised layer, by its name here with ``weight_shape`` behind it."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantisedLinear):
            yield f"{name}.{SHAPE}", torch.tensor([layer.out_features, layer.in_features])


def to_config(model: VisionLanguageModel) -> dict[str, Any] | None:
    """quantization_config of a model's config.json; None: it has no integers."""
    quantization = model.config.quantization
    if quantization is None:
        return None
    embedding = model.config.embedding_dim is not None
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name, form in quantization:
        own = keys.to_hf(f"{name}.weight", embedding_head=embedding).removesuffix(".weight")
        groups.setdefault((form.bits, form.group, form.activation_bits), []).append(own)
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
                "targets": sorted(groups[bits, group, activation_bits]),
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": bits == 8,
                    "strategy": "group",
                    "group_size": group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for i, (bits, group, activation_bits) in enumerate(order)
        },
        "ignore": sorted(floats),
        "kv_cache_scheme": None,
        OWN: {
            "activation_bits": {
                f"group_{i}": activation_bits for i, (_, _, activation_bits) in enumerate(order)
            }
        },
    }
