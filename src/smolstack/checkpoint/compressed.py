"""Layers that a checkpoint stores as integers: finds them and checks them from the file headers.

The result is read like any other checkpoint; the stored form of a layer (quantized_layer.py) does
not matter to its callers. The notes list layers that become float weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.checkpoint import keys
from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.quantized_layer import PACKED, SCALE, SHAPE, ZERO, StoredLayer
from smolstack.checkpoint.schemes import PACKED_FORM, Scheme, Schemes, read_schemes
from smolstack.checkpoint.weights import FLOAT_TYPES, Entry
from smolstack.config import ModelConfig
from smolstack.config.quantization import Format, Quantization, format_of, name_of
from smolstack.errors import CheckpointError
from smolstack.model.vlm import VisionLanguageModel

ORDER = "weight_g_idx"
_GROUPS = range(256, 0, -16)  # that are computed of others' layers, largest first
_OWN_GROUPS = range(16, 1025, 16)


def open_compressed(
    weights: Stored, raw: Mapping[str, Any], config: ModelConfig | None, *, floats: bool = False
) -> Stored:
    """Return the same weights, with integer layers as quantized layers or as floats.

    Args:
        weights: the weights as stored in the files.
        raw: config.json.
        config: the model's config; None: it is read from ``raw``.
        floats: dequantize all layers.

    Raises:
        ConfigError: config.json describes a quantization that is not supported.
        CheckpointError: the tensors of a layer do not match each other.
    """
    schemes = read_schemes(raw)
    names = _names(weights.entries, schemes)
    if not names:
        return weights
    layers = _layers(names, weights.entries, schemes, config or ModelConfig.from_hf(raw))
    if floats:
        layers = {n: replace(one, format=None, decoded="") for n, one in layers.items()}
    held = {f"{name}.{end}" for name, layer in layers.items() for end in layer.tensors}
    entries = {name: entry for name, entry in weights.entries.items() if name not in held}
    plain = list(entries)
    made: dict[str, str] = {}
    for name, layer in layers.items():
        entries.update(layer.entries())
        made.update(dict.fromkeys(layer.entries(), name))

    def read(chosen: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        wanted = entries if chosen is None else chosen
        yield from weights.read([n for n in wanted if n not in made] if chosen else plain)
        for name in dict.fromkeys(made[n] for n in wanted if n in made):
            stored = weights.read([f"{name}.{end}" for end in layers[name].tensors])
            tensors = {full.rpartition(".")[2]: tensor for full, tensor in stored}
            for full, tensor in layers[name].read(tensors).items():
                if full in wanted:
                    yield full, tensor

    return Stored(weights.folder, entries, read, weights.notes, tuple(_losses(layers)))


def with_quantization(config: ModelConfig, entries: Mapping[str, Entry]) -> ModelConfig:
    """Return the config with the formats of the layers that ``entries`` hold as integers."""
    formats, widths = {}, {}
    for name, entry in entries.items():
        if entry.format is not None:
            ours = keys.from_hf(name).removesuffix(f".{PACKED}")
            formats[ours] = entry.format
            widths[ours] = entry.weights // entry.shape[0]
    found = Quantization(name_of(formats, widths), formats) if formats else None
    return replace(config, quantization=found)


def _names(entries: Mapping[str, Entry], schemes: Schemes) -> set[str]:
    """Return the layers with any of the tensors of a quantized layer."""
    ends = tuple(f".{end}" for end in (PACKED, SCALE, ZERO, SHAPE, ORDER))
    return {
        name.rpartition(".")[0]
        for name, entry in entries.items()
        if name.endswith(ends)
        or (schemes.groups and name.endswith(".weight") and entry.dtype not in FLOAT_TYPES)
    }


def _layers(
    names: Collection[str], entries: Mapping[str, Entry], schemes: Schemes, config: ModelConfig
) -> dict[str, StoredLayer]:
    own_head = entries.get(f"{keys.EMBEDDING_HEAD}.{SCALE}")
    embedding = own_head.shape[0] if own_head is not None and own_head.shape else None
    plain = replace(config, quantization=None, tied=False, embedding_dim=embedding)
    with torch.device("meta"):
        modules = dict(VisionLanguageModel(plain).named_modules())
    layers: dict[str, StoredLayer] = {}
    problems: list[str] = []
    for name in sorted(names):
        try:
            layers[name] = _layer(name, entries, schemes, modules)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more layers)" if problems[1:] else ""
        raise CheckpointError(problems[0] + more)
    return layers


def _layer(
    name: str, entries: Mapping[str, Entry], schemes: Schemes, modules: Mapping[str, nn.Module]
) -> StoredLayer:
    ours = keys.from_hf(f"{name}.weight").removesuffix(".weight")
    module = modules.get(ours)
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise CheckpointError(f"{name} contains integers but is not a linear layer")
    scheme = schemes.of(name, "Linear" if isinstance(module, nn.Linear) else "Embedding")
    if scheme is None:
        raise CheckpointError(
            f"{name} contains integers, expected a config group of config.json's "
            "quantization_config that targets it"
        )
    outputs, inputs = module.weight.shape
    expected = _expected(scheme, outputs, inputs)
    _check(name, entries, expected)
    form, why = _format(scheme, ours, module)
    held = {end: entries[f"{name}.{end}"] for end in expected if f"{name}.{end}" in entries}
    return StoredLayer(name, outputs, inputs, scheme, form, held, why)


_Expected = tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]  # accepted shapes and dtypes


def _expected(scheme: Scheme, outputs: int, inputs: int) -> dict[str, _Expected]:
    """Return the expected tensors of a layer by name suffix."""
    groups = 1 if scheme.group is None else -(-inputs // scheme.group)
    rows = ((1,), (), (1, 1)) if scheme.whole else ((outputs, groups),)
    if groups == 1 and not scheme.whole:
        rows = (*rows, (outputs,))
    if scheme.form != PACKED_FORM:
        found: dict[str, _Expected] = {"weight": (((outputs, inputs),), ("I8",))}
        zeros: _Expected = (rows, ("I8",))
    else:
        words = -(-inputs * scheme.bits // 32)
        found = {PACKED: (((outputs, words),), ("I32",)), SHAPE: (((2,),), ("I64", "I32"))}
        zeros = (((-(-outputs * scheme.bits // 32), groups),), ("I32",))
        if scheme.whole:
            zeros = (rows, ("I8",))
    found[SCALE] = (rows, FLOAT_TYPES)
    if not scheme.symmetric:
        found[ZERO] = zeros
    return found


def _check(name: str, entries: Mapping[str, Entry], tensors: Mapping[str, _Expected]) -> None:
    for end, (shapes, dtypes) in tensors.items():
        entry = entries.get(f"{name}.{end}")
        if entry is None:
            if end == SHAPE:  # repeats what config.json says
                continue
            raise CheckpointError(f"{name} lacks {end}, expected {list(shapes[0])}")
        if entry.shape not in shapes:
            raise CheckpointError(
                f"{name}.{end} is {list(entry.shape)}, expected {list(shapes[0])}"
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{name}.{end} is stored as {entry.dtype}, expected {' or '.join(dtypes)}"
            )
    others = {f"{name}.{end}" for end in ("weight", PACKED, SCALE, ZERO, SHAPE, ORDER)}
    extra = sorted((others & set(entries)) - {f"{name}.{end}" for end in tensors})
    if extra:
        raise CheckpointError(
            f"{extra[0]} is an extra tensor of a quantized layer, "
            f"expected only {', '.join(tensors)}"
        )


def _format(scheme: Scheme, ours: str, module: nn.Module) -> tuple[Format | None, str]:
    """Return the format that computes a layer as it is stored, or the reason why there is none."""
    bits, group = scheme.bits, scheme.group
    if not isinstance(module, nn.Linear) or (why := _unfit(scheme, module.in_features)):
        return None, why if isinstance(module, nn.Linear) else "a table of embeddings"
    # 4-bit weights are multiplied with activations of 8 bits, which lose little in small groups.
    most, activation_bits = (32, 8) if bits == 4 else (256, scheme.activation_bits)
    meant = scheme.computed or group
    if scheme.own and meant is not None and meant in _OWN_GROUPS:
        return Format(bits, meant, scheme.activation_bits), ""
    if group is None:
        known = format_of(ours, module.in_features, "int8")
        if activation_bits == 8 and bits == 8 and known is not None:
            most = known.group
        return Format(bits, most, activation_bits), ""
    size = next((size for size in _GROUPS if size <= most and group % size == 0), None)
    if size is None:
        return None, f"groups of {group} input channels, expected a multiple of 16"
    return Format(bits, size, activation_bits), ""


def _unfit(scheme: Scheme, inputs: int) -> str:
    """Return why no format can hold a layer's integers, whatever their groups; empty if one can."""
    if scheme.bits == 8 and not scheme.symmetric:
        return "8 bits with zero points"
    if scheme.bits == 4 and inputs % 8:
        return f"4 bits of {inputs} input channels, which 8 does not divide"
    if scheme.bits == 4 and scheme.whole and not scheme.symmetric:
        return "one zero point for the whole tensor"
    return ""


def _losses(layers: Mapping[str, StoredLayer]) -> Iterator[str]:
    """Describe what is not preserved exactly."""
    decoded: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.decoded:
            decoded.setdefault(layer.decoded, []).append(name)
    for why, names in decoded.items():
        yield f"{_layer_count(names)} held as float weights: {why}"
    rounded = [
        name
        for name, layer in layers.items()
        if layer.format is not None and layer.tensors[SCALE].dtype != "BF16"
    ]
    if rounded:
        yield f"{_layer_count(rounded)} held with scales rounded to bfloat16, by 0.2 % at most"


def _layer_count(names: list[str]) -> str:
    """ "3 layers (a, …) are"."""
    if len(names) == 1:
        return f"one layer ({names[0]}) is"
    return f"{len(names)} layers ({names[0]}, …) are"
