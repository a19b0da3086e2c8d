"""The table of weight names, used in both directions.

The left column is smolstack's module, the right column its name in Hugging Face checkpoints;
``{i}`` is a layer index. The name of a tensor of the module is appended: its weight and bias, or
the tensors of a quantized layer. An unknown name is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from smolstack.errors import CheckpointError

_VISION, _TEXT = "model.vision_model", "model.text_model"
_VISION_LAYER, _TEXT_LAYER = f"{_VISION}.encoder.layers.{{i}}", f"{_TEXT}.layers.{{i}}"

TABLE: tuple[tuple[str, str], ...] = (
    ("vision.patch_embedding", f"{_VISION}.embeddings.patch_embedding"),
    ("vision.position_embedding", f"{_VISION}.embeddings.position_embedding"),
    ("vision.layers.{i}.attention_norm", f"{_VISION_LAYER}.layer_norm1"),
    ("vision.layers.{i}.attention.query", f"{_VISION_LAYER}.self_attn.q_proj"),
    ("vision.layers.{i}.attention.key", f"{_VISION_LAYER}.self_attn.k_proj"),
    ("vision.layers.{i}.attention.value", f"{_VISION_LAYER}.self_attn.v_proj"),
    ("vision.layers.{i}.attention.out", f"{_VISION_LAYER}.self_attn.out_proj"),
    ("vision.layers.{i}.mlp_norm", f"{_VISION_LAYER}.layer_norm2"),
    ("vision.layers.{i}.up", f"{_VISION_LAYER}.mlp.fc1"),
    ("vision.layers.{i}.down", f"{_VISION_LAYER}.mlp.fc2"),
    ("vision.norm", f"{_VISION}.post_layernorm"),
    ("connector.proj", "model.connector.modality_projection.proj"),
    ("decoder.embedding", f"{_TEXT}.embed_tokens"),
    ("decoder.layers.{i}.attention_norm", f"{_TEXT_LAYER}.input_layernorm"),
    ("decoder.layers.{i}.attention.query", f"{_TEXT_LAYER}.self_attn.q_proj"),
    ("decoder.layers.{i}.attention.key", f"{_TEXT_LAYER}.self_attn.k_proj"),
    ("decoder.layers.{i}.attention.value", f"{_TEXT_LAYER}.self_attn.v_proj"),
    ("decoder.layers.{i}.attention.out", f"{_TEXT_LAYER}.self_attn.o_proj"),
    ("decoder.layers.{i}.mlp_norm", f"{_TEXT_LAYER}.post_attention_layernorm"),
    ("decoder.layers.{i}.gate", f"{_TEXT_LAYER}.mlp.gate_proj"),
    ("decoder.layers.{i}.up", f"{_TEXT_LAYER}.mlp.up_proj"),
    ("decoder.layers.{i}.down", f"{_TEXT_LAYER}.mlp.down_proj"),
    ("decoder.norm", f"{_TEXT}.norm"),
)
# The module `head` is lm_head in a language model and `linear` in a retrieval model (ColSmol).
LM_HEAD, EMBEDDING_HEAD = "lm_head", "linear"
KINDS = (
    "weight",
    "bias",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)
_INDEX = re.compile(r"\.(\d+)(?=\.)")


def to_hf(name: str, *, embedding_head: bool = False) -> str:
    """Return the checkpoint name of a smolstack weight, e.g. ``connector.proj.weight``."""
    head = EMBEDDING_HEAD if embedding_head else LM_HEAD
    return _translate(name, {**dict(TABLE), "head": head})


def from_hf(name: str) -> str:
    """Return the smolstack name of a checkpoint's weight."""
    inverse = {theirs: ours for ours, theirs in TABLE}
    return _translate(name, {**inverse, LM_HEAD: "head", EMBEDDING_HEAD: "head"})


def unknown_to_hf(names: Iterable[str]) -> list[str]:
    """Return the checkpoint names that are not in the table."""
    unknown = []
    for name in names:
        try:
            from_hf(name)
        except CheckpointError:
            unknown.append(name)
    return unknown


def _translate(name: str, table: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    index = _INDEX.search(module + ".")
    pattern = module if index is None else _INDEX.sub(".{i}", module + ".", count=1)[:-1]
    if kind not in KINDS or pattern not in table:
        raise CheckpointError(f"{name!r} is not a weight of the Idefics3 / SmolVLM family")
    target = table[pattern]
    if index is not None:
        target = target.replace("{i}", index.group(1))
    return f"{target}.{kind}"
