"""Published shapes in miniature: the same geometry, head ratios and prompts with few parameters.

Unchanged: image size, patch size, scale, tile sizes, numbers of heads and key/value heads, RoPE
settings, the set of special tokens, ties and heads. Reduced: widths per head, layers, and the
vocabulary, in which the special tokens follow the ordinary ones without gaps.
"""

from __future__ import annotations

from dataclasses import replace

from smolstack.config import ModelConfig
from smolstack.family import Preset, SpecialTokens

ORDINARY_TOKENS = 900  # bytes and trained merges; special tokens follow


def miniature(
    preset: Preset,
    *,
    layers: int = 2,
    vision_head: int = 4,
    text_head: int = 8,
    max_positions: int | None = None,
) -> Preset:
    """Return a preset with heads of the given widths and a vocabulary of about a thousand
    tokens.
    """
    tokens = _pack(preset.tokens)
    config = preset.config
    vision = replace(
        config.vision,
        hidden_size=config.vision.num_heads * vision_head,
        intermediate_size=config.vision.num_heads * vision_head * 2,
        num_layers=layers,
    )
    width = config.text.num_heads * text_head
    text = replace(
        config.text,
        vocab_size=max(tokens.ids.values()) + 4,
        hidden_size=width,
        intermediate_size=width * 2,
        num_layers=layers,
        head_dim=text_head,
        max_positions=max_positions or config.text.max_positions,
        bos_token_id=tokens.ids[tokens.bos],
        eos_token_ids=(tokens.ids[tokens.eos],),
        pad_token_id=tokens.ids[tokens.pad],
    )
    small = ModelConfig(
        vision=vision,
        text=text,
        scale=config.scale,
        image_token_id=tokens.ids["<image>"],
        tied=config.tied,
        embedding_dim=None if config.embedding_dim is None else 16,
        model_type=config.model_type,
    )
    return replace(preset, config=small, tokens=tokens, config_keys={}, added_tokens={})


def _pack(tokens: SpecialTokens) -> SpecialTokens:
    """Return special tokens with consecutive ids after the ordinary ones, in their published
    order.
    """
    ordered = sorted(tokens.ids, key=lambda token: tokens.ids[token])
    return replace(
        tokens, ids={token: ORDINARY_TOKENS + place for place, token in enumerate(ordered)}
    )
