"""compressed-tensors' "pack-quantized" form, in which integers are stored: others read it too.

A quantised layer's tensors are weight_packed, weight_scale, weight_zero_point (of 4 bits) and
weight_shape; config.json's quantization_config says their bits, groups and symmetry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.checkpoint import keys
from smolstack.checkpoint.weights import Entry
from smolstack.config import ModelConfig
from smolstack.config.quantization import SCHEMES, Format, Quantization, format_of, name_of
from smolstack.errors import CheckpointError, ConfigError
from smolstack.model.quantised import QuantisedLinear
from smolstack.model.vlm import VisionLanguageModel

METHOD, FORM = "compressed-tensors", "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


def with_quantization(config: ModelConfig, entries: Mapping[str, Entry]) -> ModelConfig:
    """The config with the formats of the layers that ``entries`` hold as integers.

    Raises:
        CheckpointError: tensors of a layer that do not belong together.
    """
    packed = [name for name in entries if name.endswith(f".{PACKED}")]
    if not packed:
        return config
    with torch.device("meta"):
        model = VisionLanguageModel(replace(config, quantization=None))
    formats, widths = {}, {}
    for name in sorted(packed):
        module = keys.from_hf(name).removesuffix(f".{PACKED}")
        formats[module] = _format(name.removesuffix(f".{PACKED}"), module, entries, model)
        widths[module] = _linear(model, module).in_features
    return replace(config, quantization=Quantization(name_of(formats, widths), formats))


def _format(
    theirs: str, ours: str, entries: Mapping[str, Entry], model: VisionLanguageModel
) -> Format:
    """The format that fits the shapes of a layer's tensors."""
    layer = _linear(model, ours)
    scale = entries.get(f"{theirs}.{SCALE}")
    if scale is None or len(scale.shape) != 2:
        raise CheckpointError(f"{theirs} has {PACKED} and no {SCALE} of two axes beside it")
    width, words = layer.in_features, entries[f"{theirs}.{PACKED}"].shape[-1]
    bits = next((b for b in (4, 8) if words == -(-width * b // 32)), None)
    groups = scale.shape[1]
    # A layer narrower than a group has one of whatever size: then that of our own schemes.
    ours_of = [f for scheme in SCHEMES if (f := format_of(ours, width, scheme)) is not None]
    sizes = [f.group for f in ours_of if f.bits == bits] + [16, 32, 64, 128, 256]
    group = next((g for g in sizes if -(-width // g) == groups), None)
    if bits is None or group is None or (f"{theirs}.{ZERO}" in entries) != (bits == 4):
        raise CheckpointError(
            f"{theirs} of {width} input channels has {words} words, {groups} groups and "
            f"{'a' if f'{theirs}.{ZERO}' in entries else 'no'} {ZERO}; expected 4 bits with zero "
            "points or 8 bits without, in groups of 16 to 256 channels"
        )
    fine = format_of(ours, width, "int8")
    return Format(bits, group, 8 if fine is None or bits == 4 else fine.activation_bits)


def _linear(model: VisionLanguageModel, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(f"{name} is no linear layer and has {PACKED}")
    return layer


def check_method(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a config.json whose weights are integers of another form."""
    data = config.get("quantization_config")
    if data is None:
        return
    method = data.get("quant_method") if isinstance(data, Mapping) else data
    if method == "smolstack":
        raise ConfigError(
            "config.json's quantization_config is smolstack's own of before; make the folder anew "
            "from its float checkpoint: smolstack.load(MODEL, dtype=…).save(FOLDER)"
        )
    if method != METHOD:
        raise ConfigError(
            f"config.json quantization_config.quant_method is {method!r}, expected none (float "
            f"weights) or {METHOD!r}"
        )
    if data.get("format") != FORM:
        raise ConfigError(
            f"config.json quantization_config.format is {data.get('format')!r}, expected {FORM!r}"
        )


def to_config(model: VisionLanguageModel) -> dict[str, Any] | None:
    """quantization_config of a model's config.json; None: it has no integers."""
    quantization = model.config.quantization
    if quantization is None:
        return None
    embedding = model.config.embedding_dim is not None
    groups: dict[tuple[int, int], list[str]] = {}
    for name, form in quantization:
        own = keys.to_hf(f"{name}.weight", embedding_head=embedding).removesuffix(".weight")
        groups.setdefault((form.bits, form.group), []).append(own)
    floats = [
        keys.to_hf(f"{name}.weight", embedding_head=embedding).removesuffix(".weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return {
        "quant_method": METHOD,
        "format": FORM,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": sorted(names),
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
            for i, ((bits, group), names) in enumerate(sorted(groups.items()))
        },
        "ignore": sorted(floats),
        "kv_cache_scheme": None,
    }


def shapes(model: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
    """weight_shape of every quantised layer, by its name here with ``weight_shape`` behind it."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantisedLinear):
            yield f"{name}.{SHAPE}", torch.tensor([layer.out_features, layer.in_features])
