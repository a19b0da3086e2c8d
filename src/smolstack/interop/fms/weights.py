"""Converts weights between the names and layouts of Hugging Face and the Foundation Model Stack.

There are three differences. Names: converted by a table. RoPE: FMS rotates adjacent channels
(2i, 2i+1) of a head, Hugging Face's Llama (i, i + K/2), so the rows of the decoder's query and key
projections are in a different order. Fusion: FMS keeps query, key and value in one matrix, and gate
and up in another, unless ``fused_weights`` is False.

Every step takes part of a state dict, because FMS loads layer by layer, and the keyword arguments
that FMS passes: ``model_config`` and, for the tower alone, ``vision_only``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from smolstack.checkpoint import keys
from smolstack.errors import CheckpointError, ConfigError
from smolstack.interop.fms.config import Idefics3Config

Weights = Mapping[str, Tensor]

_VISION, _TEXT = "vision_tower", "language_model.base_model"
_VISION_LAYER, _TEXT_LAYER = f"{_VISION}.encoder.layers.{{i}}", f"{_TEXT}.layers.{{i}}"
# smolstack's module, FMS's module; ``{i}`` is a layer index.
TABLE: dict[str, str] = {
    "vision.patch_embedding": f"{_VISION}.embeddings.patch_embedding",
    "vision.position_embedding": f"{_VISION}.embeddings.position_embedding",
    "vision.layers.{i}.attention_norm": f"{_VISION_LAYER}.layer_norm1",
    "vision.layers.{i}.attention.query": f"{_VISION_LAYER}.attn.in_proj.query",
    "vision.layers.{i}.attention.key": f"{_VISION_LAYER}.attn.in_proj.key",
    "vision.layers.{i}.attention.value": f"{_VISION_LAYER}.attn.in_proj.value",
    "vision.layers.{i}.attention.out": f"{_VISION_LAYER}.attn.dense",
    "vision.layers.{i}.mlp_norm": f"{_VISION_LAYER}.layer_norm2",
    "vision.layers.{i}.up": f"{_VISION_LAYER}.mlp.w1",
    "vision.layers.{i}.down": f"{_VISION_LAYER}.mlp.w2",
    "vision.norm": f"{_VISION}.post_layernorm",
    "connector.proj": "connector.proj",
    "decoder.embedding": f"{_TEXT}.embedding",
    "decoder.layers.{i}.attention_norm": f"{_TEXT_LAYER}.ln",
    "decoder.layers.{i}.attention.query": f"{_TEXT_LAYER}.attn.in_proj.query",
    "decoder.layers.{i}.attention.key": f"{_TEXT_LAYER}.attn.in_proj.key",
    "decoder.layers.{i}.attention.value": f"{_TEXT_LAYER}.attn.in_proj.value",
    "decoder.layers.{i}.attention.out": f"{_TEXT_LAYER}.attn.dense",
    "decoder.layers.{i}.mlp_norm": f"{_TEXT_LAYER}.ff_ln",
    "decoder.layers.{i}.gate": f"{_TEXT_LAYER}.ff_sub_layer.wg",
    "decoder.layers.{i}.up": f"{_TEXT_LAYER}.ff_sub_layer.w1",
    "decoder.layers.{i}.down": f"{_TEXT_LAYER}.ff_sub_layer.w2",
    "decoder.norm": f"{_TEXT}.dec_norm",
    "head": "language_model.head",
}
VISION_ONLY_EMBEDDING = "text_embedding"  # its name without a decoder
# FMS's fused module and its parts, in order.
FUSED: dict[str, tuple[str, ...]] = {
    "attn.in_proj.qkv_fused": ("attn.in_proj.query", "attn.in_proj.key", "attn.in_proj.value"),
    "ff_sub_layer.wg1_fused": ("ff_sub_layer.wg", "ff_sub_layer.w1"),
}
_INDEX = re.compile(r"\.(\d+)\.")
_ROTATED = re.compile(rf"^{re.escape(_TEXT)}\.layers\.\d+\.attn\.in_proj\.(query|key)\.")


def hf_to_fms_names(weights: Weights, **options: Any) -> dict[str, Tensor]:
    """Rename a Hugging Face checkpoint's weights. Raises CheckpointError for an unknown name."""
    ours = {keys.from_hf(name): tensor for name, tensor in weights.items()}
    return smolstack_to_fms_names(ours, **options)


def smolstack_to_fms_names(
    weights: Weights, *, vision_only: bool = False, **_: Any
) -> dict[str, Tensor]:
    """Rename the weights of a smolstack model."""
    table = _table(vision_only)
    return {_translate(name, table): tensor for name, tensor in weights.items()}


def fms_to_smolstack_names(
    weights: Weights, *, vision_only: bool = False, **_: Any
) -> dict[str, Tensor]:
    """Rename an FMS model's weights. Raises CheckpointError for an unknown name."""
    table = {theirs: ours for ours, theirs in _table(vision_only).items()}
    return {_translate(name, table): tensor for name, tensor in weights.items()}


def fms_to_hf_names(weights: Weights, **options: Any) -> dict[str, Tensor]:
    """Rename an FMS model's weights to the names in Hugging Face checkpoints."""
    retrieval = _config(options).embedding_dim is not None
    return {
        keys.to_hf(name, embedding_head=retrieval): tensor
        for name, tensor in fms_to_smolstack_names(weights, **options).items()
    }


def hf_to_fms_rope(weights: Weights, **options: Any) -> dict[str, Tensor]:
    """Reorder the decoder's query and key rows for pairs (2i, 2i+1)."""
    return _reorder(weights, options, _halves_to_pairs)


def fms_to_hf_rope(weights: Weights, **options: Any) -> dict[str, Tensor]:
    """Reorder the decoder's query and key rows for pairs (i, i + K/2)."""
    return _reorder(weights, options, _pairs_to_halves)


def weight_fusion(weights: Weights, **options: Any) -> dict[str, Tensor]:
    """Fuse query, key and value, and gate and up, unless the config has them separate."""
    out = dict(weights)
    if not _config(options).fused_weights:
        return out
    for name in weights:
        for fused, parts in FUSED.items():
            before, found, kind = name.partition(f".{parts[0]}.")
            if found:
                names = [f"{before}.{part}.{kind}" for part in parts]
                out[f"{before}.{fused}.{kind}"] = torch.cat([out.pop(part) for part in names])
    return out


def weight_layout(weights: Weights, **options: Any) -> dict[str, Tensor]:
    """Convert an FMS state dict to the fusion of the config."""
    if _config(options).fused_weights:
        return weight_fusion(weights, **options)
    return weight_unfusion(weights, **options)


def weight_unfusion(weights: Weights, **options: Any) -> dict[str, Tensor]:
    """Split fused matrices into views, without copying."""
    config, out = _config(options), dict(weights)
    for name in weights:
        for fused, parts in FUSED.items():
            before, found, kind = name.partition(f".{fused}.")
            if found:
                rows = _rows(config, name, len(parts), out[name].shape[0])
                pieces = torch.split(out.pop(name), rows)
                for part, piece in zip(parts, pieces, strict=True):
                    out[f"{before}.{part}.{kind}"] = piece
    return out


def _rows(config: Idefics3Config, name: str, parts: int, total: int) -> list[int]:
    """Return the rows of each part of a fused weight: equal, except for grouped keys and values."""
    text: Any = config.text_config
    if "attn" not in name or not name.startswith(_TEXT):
        return [total // parts] * parts
    head, groups = text.emb_dim // text.nheads, text.kvheads or text.nheads
    return [text.nheads * head, groups * head, groups * head]


def _reorder(
    weights: Weights, options: Mapping[str, Any], reorder: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    text: Any = _config(options).text_config
    head = text.emb_dim // text.nheads
    return {
        name: reorder(tensor, head) if _ROTATED.match(name) else tensor
        for name, tensor in weights.items()
    }


def _halves_to_pairs(rows: Tensor, head: int) -> Tensor:
    """(heads · K, …): "(heads two half) … -> (heads half two) …"."""
    apart = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return apart.transpose(1, 2).reshape(rows.shape)


def _pairs_to_halves(rows: Tensor, head: int) -> Tensor:
    """(heads · K, …): "(heads half two) … -> (heads two half) …"."""
    apart = rows.reshape(-1, head // 2, 2, *rows.shape[1:])
    return apart.transpose(1, 2).reshape(rows.shape)


def _table(vision_only: bool) -> dict[str, str]:
    return {**TABLE, "decoder.embedding": VISION_ONLY_EMBEDDING} if vision_only else TABLE


def _translate(name: str, table: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    index = _INDEX.search(f"{module}.")
    pattern = module if index is None else _INDEX.sub(".{i}.", f"{module}.", count=1)[:-1]
    if pattern not in table:
        raise CheckpointError(f"{name!r} is not a weight of the Idefics3 / SmolVLM family")
    target = table[pattern]
    return f"{target if index is None else target.replace('{i}', index.group(1))}.{kind}"


def _config(options: Mapping[str, Any]) -> Idefics3Config:
    config = options.get("model_config")
    if not isinstance(config, Idefics3Config):
        raise ConfigError(
            f"model_config is {config!r}, expected the Idefics3Config of the model "
            "(adapter_kwargs={'model_config': model.config})"
        )
    return config
